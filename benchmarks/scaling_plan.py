"""The load that the real plan puts on machines and ranks: shards, bytes, clips and objects."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from index import memory
from scaling_index import Sizes

from medsam2.data.plan.plan import Plan
from medsam2.data.read.catalog import Catalog
from medsam2.data.read.reader import MAX_READ_BYTES
from medsam2.data.read.store import RemoteStore
from medsam2.data.settings import DataSettings

CLIP_FRAMES = 8


@dataclass(frozen=True)
class Cluster:
    """ranks: number of GPUs. per_node: GPUs per machine. clips: clips in a rank's batch."""

    ranks: int
    per_node: int = 8
    clips: int = 8

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.per_node)


class Demand:
    """The plan of a cluster over a generated index."""

    def __init__(self, folder: Path, sizes: Sizes, cluster: Cluster) -> None:
        self.sizes, self.cluster = sizes, cluster
        settings = DataSettings(shards=(str(folder),), clip_frames=CLIP_FRAMES, clips_per_batch=cluster.clips)
        self.plan = Plan([Catalog(folder)], settings, 0, cluster.ranks * cluster.clips)

    def rows(self, step: int, node: int) -> list[int]:
        """Return the index rows that a machine's ranks read in a step; each is one range, and nothing is cached."""
        return [entry.row for entry in self.plan.batch(step, node, self.cluster.nodes)]


@dataclass(frozen=True)
class Ranges:
    """The cost of reading a clip of a segment by range. bytes, requests: int64 [R]."""

    bytes: np.ndarray
    requests: np.ndarray


def ranges(sizes: Sizes, frames: int, strides: int = 2) -> Ranges:
    """A clip of each segment, of frames that are 1 to `strides` apart, by the rule of `data.read.reader.group_members`.

    Frames between those of the clip are read too if that is cheaper than another request.
    """
    stride = 1 + np.random.default_rng(0).integers(strides, size=len(sizes.segment_bytes))
    frame = sizes.segment_bytes / frames
    span = frame * (1 + (CLIP_FRAMES - 1) * stride)
    apart = (stride - 1) * frame > RemoteStore.max_gap
    read = np.where(apart, CLIP_FRAMES * frame, span)
    return Ranges(read.astype(np.int64), np.where(apart, CLIP_FRAMES, np.ceil(span / MAX_READ_BYTES)).astype(np.int64))


def balance(demand: Demand, steps: int) -> dict[str, float]:
    """Return the balance over ranks: clips, objects and bytes per step, the largest load over the mean."""
    cluster, plan = demand.cluster, demand.plan
    objects = np.zeros((steps, cluster.ranks))
    read = np.zeros((steps, cluster.ranks))
    clips = set()
    for step in range(steps):
        for rank in range(cluster.ranks):
            entries = plan.batch(step, rank, cluster.ranks)
            clips.add(len(entries))
            objects[step, rank] = sum(len(entry.objects) for entry in entries)
            read[step, rank] = demand.sizes.segment_bytes[[entry.row for entry in entries]].sum()
    return {
        "clips_most_over_least": max(clips) / min(clips),
        "objects_most_over_mean": float((objects.max(axis=1) / objects.mean(axis=1)).mean()),
        "bytes_most_over_mean": float((read.max(axis=1) / read.mean(axis=1)).mean()),
        "bytes_most_over_mean_in_all": float(read.sum(axis=0).max() / read.sum(axis=0).mean()),
    }


def start(folder: Path) -> dict[str, float]:
    """Measure one rank of 1,024 in a separate process: open the index, plan and look up the first batch."""
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(folder: Path) -> dict[str, float]:
    """Measure CPU seconds, which depend less on other load, and memory beyond that of an idle process."""
    before, most, done = memory("Anonymous"), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon"))
            most[0] = max(most[0], int(line.split()[1]) / 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    marks = [time.thread_time()]
    catalog = Catalog(folder)
    marks.append(time.thread_time())
    settings = DataSettings(shards=(str(folder),), clip_frames=CLIP_FRAMES)
    plan = Plan([catalog], settings, 0, 8192)
    marks.append(time.thread_time())
    plan.batch(0, 7, 1024)
    marks.append(time.thread_time())
    done.set()
    watcher.join()
    open_s, plan_s, first_s = np.diff(marks).round(3).tolist()
    begin = time.thread_time()
    for step in range(1, 101):
        plan.batch(step, 7, 1024)
    return {
        "open_s": open_s,
        "plan_s": plan_s,
        "first_batch_s": first_s,
        "batch_ms": round((time.thread_time() - begin) * 10, 3),
        "rank_mib": round(memory("Anonymous") - before),
        "peak_mib": round(most[0] - before),
    }


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
