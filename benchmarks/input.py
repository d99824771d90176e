"""Time of clips from shards to the model's input; peer: Meta's `training.dataset` on the same clips.

    make peers && python benchmarks/input.py      # a few minutes
    python benchmarks/input.py --quick            # under a minute

Measures CPU milliseconds per clip on one thread, with 8 frames of 512 x 512: our worker path (plan, read, decode,
stack; batches of 8 from shards in the page cache), our augmentation on the CPU, and both. Meta's dataset reads the same
scans as JPEG + PNG with the transforms of its MOSE recipe. Results are medians over the batches of a run, then over
runs; `least` is the minimum, which depends least on other load. "in a worker" is the same path inside a `DataLoader`
worker, which allocates shared memory for each batch. Memory is that of a process minus that of an idle one. Then two
workers supply a consumer that takes clips at a fixed rate, from local shards and by range over HTTP, from a server that
answers at once and from one that takes 50 ms.

Ends with one line of JSON: `ratio_time` is ours (worker path + augmentation) over Meta's with one object, and
`ratio_memory` is the memory of a worker of ours over that of a process of theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import input_clips

HERE = Path(__file__).resolve().parent
AIMS = {1: (3.0, 10), 3: (None, 12), 8: (5.0, None)}  # ms of the worker path, how many times faster than Meta
LATENCY_MS = 50
SINGLE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def script(name: str, *arguments: object) -> Any:
    """Run a script beside this one in a separate process with one thread, and return the JSON that it prints last."""
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **SINGLE}, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"{name} failed")
    return json.loads(done.stdout.strip().splitlines()[-1])


class Series:
    """Milliseconds per clip of several runs."""

    def __init__(self) -> None:
        self.runs: list[list[float]] = []

    def add(self, values: list[float]) -> None:
        self.runs.append(values)

    @property
    def median(self) -> float:
        return statistics.median(statistics.median(values) for values in self.runs)

    @property
    def least(self) -> float:
        return min(min(values) for values in self.runs)


def measure(scratch: Path, runs: int, batches: int, clips: int) -> dict[int, dict[str, Any]]:
    """For 1, 3 and 8 objects: series of each part, and memory in MB."""
    found: dict[int, dict[str, Any]] = {}
    for objects in (1, 3, 8):
        parts = {name: Series() for name in ("read", "augment", "both", "in_worker", "meta")}
        ours: list[Any] = []
        theirs: list[Any] = []
        for run in range(runs):  # one after the other, so that both have the same load of the machine
            ours.append(script("input_ours.py", scratch / f"shards{objects}", objects, batches))
            for name in ("read", "augment", "in_worker"):
                parts[name].add(ours[-1][name])
            parts["both"].add([a + b for a, b in zip(ours[-1]["read"], ours[-1]["augment"], strict=True)])
            if objects != 8:
                theirs.append(script("peer_meta.py", scratch / f"pictures{objects}", objects, clips))
                parts["meta"].add(theirs[-1]["ms"])
            print(f"{objects} objects, run {run + 1} of {runs} done", file=sys.stderr)
        found[objects] = {
            **parts,
            "memory_mb": statistics.median(r["worker_memory_mb"] for r in ours),
            "meta_memory_mb": statistics.median(r["memory_mb"] for r in theirs) if theirs else None,
        }
    return found


def show(found: dict[int, dict[str, Any]]) -> None:
    """The table of CPU time."""
    names = {
        "read": "worker path",
        "in_worker": "  in a worker",
        "augment": "augmentation",
        "both": "worker path + augmentation",
        "meta": "Meta training.dataset",
    }
    print(f"\n{'CPU ms per clip, one thread':<28} {'objects':>7} {'median':>8} {'least':>8} {'clips/s':>8}  aim")
    for objects, parts in found.items():
        most, times = AIMS[objects]
        for name, label in names.items():
            series = parts[name]
            if not series.runs:
                continue
            aim = f"at most {most:g} ms" if name == "read" and most else ""
            if name == "both" and parts["meta"].runs:
                ratio = parts["meta"].median / series.median, parts["meta"].least / series.least
                aim = f"Meta's / {times}; it is / {ratio[0]:.1f} (least: / {ratio[1]:.1f})"
            figures = f"{series.median:>8.2f} {series.least:>8.2f} {1e3 / series.median:>8.1f}"
            print(f"{label:<28} {objects:>7} {figures}  {aim}")


def lengths(scratch: Path, batches: int, short: dict[str, Any]) -> dict[int, tuple[float, float]]:
    """By frames per segment: least CPU ms per clip of the worker path, and MB of a worker above an idle one."""
    long = script("input_ours.py", scratch / "long", 1, batches)
    found = {16: (short["read"].least, short["memory_mb"]), 512: (min(long["read"]), long["worker_memory_mb"])}
    print(f"\n{'frames per segment':<28} {'ms per clip':>10} {'worker MB':>10}  aim: the same, at most 150 MiB")
    for frames, (milliseconds, megabytes) in found.items():
        print(f"{frames:<28} {milliseconds:>10.2f} {megabytes:>10.0f}")
    return found


def feed(scratch: Path, seconds: float) -> dict[str, Any]:
    """Measure how long a consumer with two workers waits for local shards, and for shards behind HTTP."""
    servers = [
        subprocess.Popen(
            [sys.executable, str(HERE / "input_feed.py"), "serve", str(scratch / "feed"), str(latency)],
            stdout=subprocess.PIPE, text=True,
        )
        for latency in (0, LATENCY_MS)
    ]  # fmt: skip
    found = {}
    print(
        f"\n{'two workers, 3 objects':<28} {'asked/s':>8} {'got/s':>8} {'waited':>8} {'longest':>8} {'first':>8} "
        f"{'MB per clip':>10}  CPU ms per clip: workers, consumer"
    )
    try:
        near, far = (server.stdout.readline().strip() for server in servers if server.stdout is not None)
        for name, shards, rate in (
            ("local", str(scratch / "feed"), 200),
            ("HTTP", near, 100),
            (f"{LATENCY_MS} ms away", far, 100),
        ):
            result = script("input_feed.py", shards, rate, seconds)
            found[name] = result
            print(
                f"{name:<28} {rate:>8} {result['clips_a_second']:>8.1f} {result['waited_percent']:>7.1f}% "
                f"{result['longest_wait_ms']:>5} ms {result['first_batch_s']:>6.1f} s {result['mb_a_clip']:>10.2f}"
                f"  {result['workers_cpu_ms']:.2f}, {result['consumer_cpu_ms']:.2f}"
            )
    finally:
        for server in servers:
            server.terminate()
            server.wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer clips, under a minute")
    parser.add_argument("--runs", type=int, help="of which the median is stated (1 with --quick, else 3)")
    arguments = parser.parse_args()
    quick = arguments.quick
    runs = arguments.runs or (1 if quick else 3)
    batches, clips, seconds = (4, 4, 2.0) if quick else (20, 24, 8.0)
    scratch = Path(tempfile.mkdtemp(prefix="medsam2-input-"))
    try:
        segments = 3 if quick else 6
        print("writing clips ...", file=sys.stderr)
        for objects in (1, 3, 8):
            input_clips.write_shards(scratch / f"shards{objects}", segments, 16, objects)
            if objects != 8:
                input_clips.write_pictures(scratch / f"pictures{objects}", segments, 16, objects)
        input_clips.write_shards(scratch / "long", 1, 512, 1)
        input_clips.write_shards(scratch / "feed", 4, 16, 3, shards=4 if quick else 12)
        found = measure(scratch, runs, batches, clips)
        show(found)
        by_length = lengths(scratch, batches, found[1])
        fed = feed(scratch, seconds)
        print(json.dumps(summary(found, by_length, fed)))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def summary(found: dict[int, dict[str, Any]], by_length: dict[int, tuple[float, float]], fed: Any) -> dict[str, Any]:
    """The last line."""

    def medians(name: str) -> dict[str, float]:
        return {str(n): round(parts[name].median, 2) for n, parts in found.items() if parts[name].runs}

    return {
        "name": "input",
        "machine": f"{platform.machine()}, 1 thread; feeding: {len(os.sched_getaffinity(0))} processors",
        "ours": {
            "worker_ms": medians("read"),
            "worker_ms_least": {str(n): round(parts["read"].least, 2) for n, parts in found.items()},
            "in_worker_ms": medians("in_worker"),
            "augment_ms": medians("augment"),
            "both_ms": medians("both"),
            "worker_mb": {str(n): round(parts["memory_mb"]) for n, parts in found.items()},
            "by_segment_frames": {str(n): [round(ms, 2), round(mb)] for n, (ms, mb) in by_length.items()},
            "feed": fed,
        },
        "peer": {
            "what": "sam2 1.1.0 training.dataset, JPEG + PNG",
            "ms": medians("meta"),
            "mb": {str(n): round(p["meta_memory_mb"]) for n, p in found.items() if p["meta_memory_mb"] is not None},
        },
        "ratio_time": round(found[1]["both"].median / found[1]["meta"].median, 3),
        "ratio_time_3_objects": round(found[3]["both"].median / found[3]["meta"].median, 3),
        "ratio_memory": round(found[1]["memory_mb"] / found[1]["meta_memory_mb"], 2),
    }


if __name__ == "__main__":
    main()
