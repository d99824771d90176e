"""Memory and time of an index of a million segments per rank; peer: the same rows as Python dictionaries.

    python benchmarks/index.py            # 1,000,000 segments of 32 frames with 2 objects: 2 GB of index, 2 minutes
    python benchmarks/index.py --quick    # 50,000, under a minute

The index is generated and in the page cache. Memory is the anonymous memory (`/proc/self/smaps_rollup`) minus that of
the same process with an index of 100 segments. Pages of the mapped file are shared by all processes of a machine and do
not count. `rank_mib` is the memory after the start, `rank_peak_mib` the peak during the start. The memory of a worker
is what it modifies after a fork while it looks up clips. Each number is the median of several processes. The peer is
`to_pylist` of the columns that the plan and the reader use, on a tenth of the rows, times ten. Ends with one line of
JSON.
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
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

FRAMES, OBJECTS = 32, 2
DATASETS, NAMES, SEGMENTS_A_CASE, SEGMENTS_A_SHARD = 12, 40, 4, 200
LATE = 100_000
STEPS, CLIPS = 1000, 8
PEER_COLUMNS = ("key", "dataset", "split", "case", "modality", "shard", "height", "width", "channels", "mask_planes",
                "mask_dtype", "codec", "mask_codec", "objects", "frame_offset", "frame_length", "mask_offset",
                "mask_length")  # fmt: skip


def lists(values: np.ndarray, length: int) -> pa.ListArray:
    """Group values into lists of equal length."""
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, length, dtype=np.int32)), pa.array(values))


def coded(codes: np.ndarray, texts: pa.Array | list[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(texts, pa.string()))


def hashes(rng: np.random.Generator, count: int, digits: int) -> pa.Array:
    """Make texts of a number of hexadecimal digits."""
    digest = np.frombuffer(rng.bytes(count * digits // 2).hex().encode(), f"S{digits}")
    return pa.array(digest, pa.binary()).cast(pa.string())


def generate(segments: int, seed: int = 0) -> pa.Table:
    """An index of `segments` of 32 frames and 2 objects, in the columns that `medsam2 prepare` writes."""
    import pyarrow.compute as pc

    from medsam2.shards.index import schema

    rng = np.random.default_rng(seed)
    case = np.arange(segments) // SEGMENTS_A_CASE
    cases, shards = int(case[-1]) + 1, -(-segments // SEGMENTS_A_SHARD)
    dataset = case * DATASETS // cases
    case_texts = hashes(rng, cases, 16)
    number = np.arange(segments) % SEGMENTS_A_CASE
    numbers = pa.array(np.array([f"{n * FRAMES:05d}" for n in range(SEGMENTS_A_CASE)])).take(pa.array(number))
    lengths = rng.integers(20_000, 90_000, (segments, FRAMES, 2), dtype=np.int64)
    ends = np.cumsum(lengths.reshape(segments, -1) + 512, axis=1).reshape(lengths.shape)
    pixels = rng.integers(0, 5000, (segments * OBJECTS, FRAMES), dtype=np.int32)
    pixels[rng.random(len(pixels)) < 0.3, FRAMES // 2 :] = 0
    boxes = np.tile(np.array([10, 20, 80, 90], np.int32), pixels.size)
    lines = pa.ListArray.from_arrays(
        pa.array(np.zeros(len(pixels) + 1, np.int32)), pa.array(np.zeros(0, np.float32))
    )  # fmt: skip
    names = coded(rng.integers(0, NAMES, len(pixels)), [f"structure_{n:02d}" for n in range(NAMES)])
    columns: dict[str, pa.Array] = {
        "name": names, "value": pa.array(np.tile(np.array([1, 2], np.int32), segments)),
        "plane": pa.array(np.zeros(len(pixels), np.int32)), "peak": pa.array(pixels.max(axis=1)),
        "pixels": lists(pixels.reshape(-1), FRAMES), "boxes": lists(boxes, FRAMES * 4), "lines": lines,
    }  # fmt: skip
    kinds = schema().field("objects").type.value_type
    objects = pa.StructArray.from_arrays([columns[f.name] for f in kinds], fields=list(kinds))
    offsets = pa.array(np.arange(0, len(pixels) + 1, OBJECTS, dtype=np.int32))
    same = {name: coded(np.zeros(segments), [text]) for name, text in (
        ("kind", "volume"), ("mask_dtype", "uint8"), ("codec", "zstd"), ("mask_codec", "zstd"), ("window", "none")
    )}  # fmt: skip
    sizes = {"height": 512, "width": 512, "channels": 1, "mask_planes": 1, "json_length": 900}
    datasets = [f"dataset_{n:02d}" for n in range(DATASETS)]
    rows: dict[str, Any] = {
        **same,
        **{name: pa.array(np.full(segments, size, np.int32)) for name, size in sizes.items()},
        "key": pc.binary_join_element_wise(case_texts.take(pa.array(case)), numbers, "-"),
        "dataset": coded(dataset, datasets),
        "split": coded(case % 10 == 0, ["train", "val"]),
        "case": coded(case, case_texts),
        "patient": coded(case, hashes(rng, cases, 16)),
        "content_hash": coded(case, hashes(rng, cases, 64)),
        "modality": coded(dataset % 4, ["CT", "MR", "US", "PT"]),
        "frames": lists((number[:, None] * FRAMES + np.arange(FRAMES)).astype(np.int32).reshape(-1), FRAMES),
        "spacing": lists(np.tile([2.0, 0.8, 0.8], segments), 3),
        "scale": lists(np.ones(segments * 2), 2),
        "original_shape": lists(np.tile(np.array([128, 512, 512], np.int32), segments), 3),
        "objects": pa.ListArray.from_arrays(offsets, objects),
        "shard": coded(np.arange(segments) // SEGMENTS_A_SHARD, [f"big-train-{n:06d}.tar" for n in range(shards)]),
        "json_offset": pa.array(np.full(segments, 512, np.int64)),
    }
    for place, kind in enumerate(("frame", "mask")):
        rows[f"{kind}_offset"] = lists((ends - lengths)[:, :, place].reshape(-1), FRAMES)
        rows[f"{kind}_length"] = lists(lengths[:, :, place].astype(np.int32).reshape(-1), FRAMES)
    return pa.Table.from_arrays([rows[name] for name in schema().names], schema=schema())


def write(folder: Path, segments: int) -> Path:
    """A folder with a generated index and no shards."""
    from medsam2.shards.index import write_table

    folder.mkdir(parents=True)
    write_table(folder, generate(segments))
    return folder


def memory(*names: str) -> float:
    """Sum these lines of smaps_rollup of this process, in MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return sum(sizes[name] for name in names) / 1024


def start(folder: Path, step: int) -> tuple[Any, dict[str, float]]:
    """Open the index, plan and look up the first batch; return the plan and the seconds of each part."""
    from medsam2.data.plan.plan import Plan
    from medsam2.data.read.catalog import Catalog
    from medsam2.data.settings import DataSettings

    marks = [time.perf_counter()]
    catalog = Catalog(folder)
    marks.append(time.perf_counter())
    plan = Plan([catalog], DataSettings(shards=(str(folder),)), 0, CLIPS)
    marks.append(time.perf_counter())
    plan.batch(step)
    marks.append(time.perf_counter())
    return plan, dict(zip(("open", "plan", "first_batch"), np.diff(marks).tolist(), strict=True))


def peak_while_starting(folder: Path, before: float) -> float:
    """Peak anonymous memory while a plan is made, in MiB beyond `before`, sampled every millisecond."""
    found, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):  # from `status`, since summing smaps would stop the process for a while
            line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon"))
            found.append(int(line.split()[1]) / 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start(folder, 0)
    done.set()
    watcher.join()
    return max(found) - before


def in_worker(plan: Any, steps: int) -> float:
    """MiB that a forked worker modifies while it looks up the clips of `STEPS` steps."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        before = memory("Private_Dirty")
        for step in range(steps):
            for entry in plan.batch(step):
                plan.catalogs[0].location(entry.row)
                plan.catalogs[0].objects(entry.row)
        os.write(writer, f"{memory('Private_Dirty') - before}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    found = float(os.read(reader, 100))
    for descriptor in (reader, writer):
        os.close(descriptor)
    return found


def measure(folder: Path, small: Path, step: int) -> dict[str, float]:
    """Measure what this new process needs to start at `step`."""
    start(small, step)  # loads modules that are imported on first use
    before = memory("Anonymous")
    plan, found = start(folder, step)
    found["rank_mib"] = memory("Anonymous") - before
    begin = time.perf_counter()
    for following in range(step, step + STEPS):
        plan.batch(following)
    found["thousand_steps"] = time.perf_counter() - begin
    found["worker_mib"] = in_worker(plan, 200)
    catalog, rows = plan.catalogs[0], np.random.default_rng(0).integers(0, len(plan.catalogs[0]), 5000).tolist()
    for name in ("location", "objects"):
        begin, look_up = time.perf_counter(), getattr(catalog, name)
        for row in rows:
            look_up(row)
        found[f"{name}_us"] = (time.perf_counter() - begin) / len(rows) * 1e6
    begin = time.perf_counter()
    catalog.digest(np.arange(len(catalog)))
    found["digest"] = time.perf_counter() - begin
    del catalog, plan, look_up
    found["rank_peak_mib"] = peak_while_starting(folder, before)
    return found


def measure_peer(folder: Path) -> dict[str, float]:
    """Measure seconds and MiB of a tenth of the rows as Python dictionaries, times ten."""
    from medsam2.shards.index import read_index

    table = read_index(folder).table
    before, begin = memory("Anonymous"), time.perf_counter()
    rows = table.slice(0, len(table) // 10).select(list(PEER_COLUMNS)).to_pylist()
    seconds = time.perf_counter() - begin
    return {"seconds": seconds * 10, "mib": (memory("Anonymous") - before) * 10, "rows": len(rows)}


def fresh(*arguments: str) -> dict[str, float]:
    """Run this script in a separate process and return the numbers that it prints."""
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}


def report(scratch: Path, segments: int, runs: int) -> dict[str, Any]:
    """Generate, measure and compare."""
    folder, small = write(scratch / "big", segments), write(scratch / "small", 100)
    size = (folder / "index.arrow").stat().st_size
    print(f"index of {segments} segments, {size / 1e6:.0f} MB", file=sys.stderr)
    found: dict[int, list[dict[str, float]]] = {0: [], LATE: []}
    peers = []
    for run in range(runs):
        for step, figures in found.items():
            figures.append(fresh("--measure", str(folder), str(small), str(step)))
            print(f"run {run}, from step {step}: {figures[-1]}", file=sys.stderr)
        peers.append(fresh("--peer", str(folder)))
        print(f"run {run}, peer: {peers[-1]}", file=sys.stderr)
    early, late, peer = medians(found[0]), medians(found[LATE]), medians(peers)
    seconds, late_seconds = (sum(f[name] for name in ("open", "plan", "first_batch")) for f in (early, late))
    return {
        "name": "index",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "segments": segments,
        "index_mb": round(size / 1e6),
        "ours": {**early, "seconds": round(seconds, 3), f"seconds_from_{LATE}": round(late_seconds, 3),
                 f"first_batch_at_{LATE}": late["first_batch"]},
        "peer": {"what": "to_pylist of a tenth of the rows, times ten", **peer},
        "ratio_time": round(seconds / peer["seconds"], 4),
        "ratio_memory": round(early["rank_mib"] / peer["mib"], 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50,000 segments, under a minute")
    parser.add_argument("--segments", type=int, help="how many to generate")
    parser.add_argument("--runs", type=int, default=3, help="of which the median is stated")
    parser.add_argument("--measure", nargs=3, metavar=("FOLDER", "SMALL", "STEP"), help=argparse.SUPPRESS)
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        folder, small, step = arguments.measure
        print(json.dumps(measure(Path(folder), Path(small), int(step))))
    elif arguments.peer:
        print(json.dumps(measure_peer(arguments.peer)))
    else:
        scratch = Path(tempfile.mkdtemp(prefix="medsam2-index-"))
        try:
            segments = arguments.segments or (50_000 if arguments.quick else 1_000_000)
            print(json.dumps(report(scratch, segments, arguments.runs)))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
