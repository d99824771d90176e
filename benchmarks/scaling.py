"""Throughput of 1 to 1,024 GPUs on 100,000 remote shards and its limits, with the real plan and simulated machines.

    python benchmarks/scaling.py                                     # some minutes, 8 GiB
    python benchmarks/scaling.py --quick                             # 4,000 shards, under a minute
    python benchmarks/scaling.py --figure docs/images/scaling.png --gpu-seconds 0.03

The real catalog opens a generated index of that many shards, and the real `medsam2.data.plan.plan` decides which rank
reads which segment at which step. This gives the balance over ranks and the cost of planning per rank. An event
simulation of a few machines (`scaling_feed.py`) stands for all: workers request the ranges of a batch together, wait
for them and decode them. The time of a step follows from the costs of a clip (`scaling_yield.py`;
docs/explanation/scaling.md states which are measured and which assumed).

Ends with one line of JSON: `ratio_time` is the time per clip and GPU with the largest number of GPUs over that with one
GPU, `ratio_memory` the same ratio of fetched bytes per clip.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from scaling_feed import PREFETCH, Line, Machine, feed
from scaling_index import Sizes, write
from scaling_plan import Cluster, Demand, Ranges, balance, ranges, start
from scaling_yield import Costs, Step, limits, step

FRAMES, SHARD_BYTES = 64, 256 << 20  # defaults of `medsam2 prepare`
QUICK = (1, 8, 64, 1024)
FULL = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
PER_NODE, CLIPS = 8, 8


def checkpoint_seconds(folder: Path, size: int) -> float:
    """Measure seconds to write a checkpoint of `size` bytes as a run does: write beside, fsync, rename."""
    from medsam2.files import atomic_write

    content = os.urandom(1 << 20)
    begin = time.perf_counter()
    with atomic_write(folder / "checkpoint", "wb") as file:
        for _ in range(size >> 20):
            file.write(content)
    return time.perf_counter() - begin


def simulate(demand: Demand, costs: Costs, parts: Step, sampled: int, rounds: int, read: Ranges) -> dict[str, Any]:
    """Simulate one cluster: clips per second, waiting time and bytes of a machine that reads `rounds` * 1,000 clips."""
    cluster = demand.cluster
    own = min(cluster.ranks, cluster.per_node)
    steps = rounds * 1000 // (own * cluster.clips)
    warm = steps // 3
    requests = float(read.requests.mean())
    line = Line(
        own * costs.workers * cluster.clips, costs.connection, min(costs.between, costs.bucket / cluster.nodes),
        PREFETCH * costs.workers, costs.request_s + costs.batch_cpu(cluster.clips),
        costs.requests / cluster.nodes / requests,
    )  # fmt: skip
    chosen = sorted({round(n * (cluster.nodes - 1) / max(1, sampled - 1)) for n in range(sampled)})
    machines = [Machine(lambda number, node=node: demand.rows(number, node), read.bytes, line) for node in chosen]  # type: ignore[misc]
    fed = feed(machines, steps, warm, parts.seconds)
    clips = cluster.ranks * cluster.clips
    segment = demand.sizes.segment_bytes[demand.rows(0, 0)].mean()
    clip_bytes = fed.fetched / (own * cluster.clips)
    rate = clips / parts.seconds
    allowed = limits(costs, cluster.ranks, cluster.per_node, rate, clip_bytes, requests, cluster.clips)
    order = sorted(allowed, key=lambda name: allowed[name])
    return {
        "gpus": cluster.ranks, "clips_per_s": clips * (steps - warm) / fed.seconds,
        "waiting": fed.stalled, "first_batch_s": fed.first, "mb_a_clip": clip_bytes / 1e6,
        "requests_a_clip": requests,
        "times_the_segment": clip_bytes / segment,
        "gb_a_machine_and_s": fed.fetched * (steps - warm) / fed.seconds / 1e9,
        "limit": order[0], "next_limit": order[1],
        "limits": {name: round(value, 1) for name, value in allowed.items()},
    }  # fmt: skip


def sweep(folder: Path, sizes: Sizes, costs: Costs, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Simulate all numbers of GPUs."""
    rows: list[dict[str, Any]] = []
    sampled, rounds, looked_at = (2, 6, 1) if arguments.quick else (8, 15, 4)
    read = ranges(sizes, FRAMES)
    heads = ("clips/s", "of ideal", "waiting", "MB a clip", "GB/s a machine")
    print("\n GPUs " + " ".join(f"{head:>{len(head) + 1}}" for head in heads) + "  limit, the next one")
    for ranks in arguments.gpus or (QUICK if arguments.quick else FULL):
        demand = Demand(folder, sizes, Cluster(ranks, PER_NODE, CLIPS))
        even = balance(demand, max(looked_at, 128 // ranks))
        parts = step(costs, ranks, PER_NODE, CLIPS, even["objects_most_over_mean"])
        row = {**simulate(demand, costs, parts, sampled, rounds, read), **even, "step": asdict(parts)}
        row["efficiency"] = row["clips_per_s"] * costs.gpu_s / ranks
        rows.append(row)
        print(
            f"{ranks:>5} {row['clips_per_s']:>8.0f} {row['efficiency']:>9.0%} {row['waiting']:>8.1%} "
            f"{row['mb_a_clip']:>10.1f} {row['gb_a_machine_and_s']:>15.2f}  {row['limit']}, {row['next_limit']}",
            flush=True,
        )
    return rows


def report(scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    shards = arguments.shards or (4_000 if arguments.quick else 100_000)
    print(f"generating the index of {shards} shards ...", file=sys.stderr, flush=True)
    sizes = write(scratch / "shards", shards, FRAMES, SHARD_BYTES)
    size = (scratch / "shards" / "index.arrow").stat().st_size
    total = float(sizes.shard_bytes.sum())
    print(f"{len(sizes.shard_bytes)} shards, {len(sizes.shard_of)} segments, {total / 1e12:.1f} TB; index of "
          f"{size / 1e6:.0f} MB")  # fmt: skip
    costs = Costs(
        gpu_s=arguments.gpu_seconds, workers=arguments.workers, bucket=arguments.bucket_gb * 1e9,
        between=arguments.network_gb * 1e9, connection=arguments.connection_mb * 1e6,
        decode_s=arguments.decode_ms / 1e3, gradient_bytes=arguments.gradient_mb * 1e6,
        request_s=arguments.request_ms / 1e3, requests=arguments.bucket_requests,
    )  # fmt: skip
    # weights, two averages of AdamW and the moving average of the weights
    costs = replace(costs, checkpoint_s=checkpoint_seconds(scratch, int(4 * costs.gradient_bytes)))
    planning = start(scratch / "shards")
    print(f"one of 1,024 ranks: {planning}")
    rows = sweep(scratch / "shards", sizes, costs, arguments)
    if arguments.figure:
        from scaling_figure import draw

        draw(rows, costs, arguments.figure)
    alone, last = rows[0], rows[-1]
    return {
        "name": "scaling",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "shards": len(sizes.shard_bytes), "segments": len(sizes.shard_of), "terabytes": round(total / 1e12, 2),
        "index_mb": round(size / 1e6), "costs": asdict(costs), "planning": planning,
        "ours": [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows],
        "peer": {"what": f"the same on {alone['gpus']} GPU", "clips_per_s": round(alone["clips_per_s"], 1)},
        "ratio_time": round(alone["efficiency"] / last["efficiency"], 4),
        "ratio_memory": round(last["mb_a_clip"] / alone["mb_a_clip"], 4),
    }  # fmt: skip


def main() -> None:
    own = Costs()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4,000 shards and few numbers of GPUs, under a minute")
    parser.add_argument("--shards", type=int, help="of 256 MiB")
    parser.add_argument("--gpus", type=int, nargs="+", help="numbers of GPUs, ascending")
    parser.add_argument("--figure", type=Path, help="write the figure there")
    parser.add_argument("--gpu-seconds", type=float, default=own.gpu_s, help="of a clip on one GPU")
    parser.add_argument("--decode-ms", type=float, default=own.decode_s * 1e3, help="CPU time of a clip in a worker")
    parser.add_argument("--gradient-mb", type=float, default=own.gradient_bytes / 1e6, help="sent in a step")
    parser.add_argument("--workers", type=int, default=own.workers, help="data.workers")
    parser.add_argument("--connection-mb", type=float, default=own.connection / 1e6, help="MB a second of a download")
    parser.add_argument("--network-gb", type=float, default=own.between / 1e9, help="GB a second of a machine")
    parser.add_argument("--request-ms", type=float, default=own.request_s * 1e3, help="until a range is answered")
    parser.add_argument("--bucket-requests", type=float, default=own.requests, help="a second that the bucket answers")
    parser.add_argument("--bucket-gb", type=float, default=own.bucket / 1e9, help="GB a second of the bucket")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="medsam2-scaling-"))
    try:
        print(json.dumps(report(scratch, arguments)))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
