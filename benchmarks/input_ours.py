"""Our worker path and augmentation on one thread: CPU milliseconds a clip and memory, as one line of JSON.

    python benchmarks/input_ours.py SHARDS OBJECTS BATCHES

`benchmarks/input.py` runs it in a separate process. A batch has 8 clips of 8 frames. Memory is that of the worker path,
beyond the memory of the process after all imports and planning.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

CLIPS = 8


def settings_of(shards: str, objects: int, **more: Any) -> Any:
    """Make the settings `data` for a folder or URL of generated clips."""
    from medsam2.data.settings import DataSettings

    return DataSettings(shards=(shards,), max_objects=objects, clips_per_batch=CLIPS, **more)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(action: Any) -> tuple[Any, float]:
    """Return the result, and CPU milliseconds per clip."""
    start = time.process_time()
    result = action()
    return result, 1e3 * (time.process_time() - start) / CLIPS


class Timed:
    """A dataset whose items are the cost of each batch in a loader's worker, and the worker's peak memory so far."""

    def __init__(self, dataset: Any, idle: float = 0.0) -> None:
        self.dataset = dataset
        self.idle = idle

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, step: int) -> tuple[float, float]:
        if step == 0:
            self.idle = peak_mb()
        _, milliseconds = timed(lambda: self.dataset[step])
        return milliseconds, peak_mb() - self.idle


def main() -> None:
    shards, objects, batches = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    import cv2
    import torch
    import yaml
    from torch.utils.data import DataLoader

    from medsam2.data.augment.augment import Augment
    from medsam2.data.plan.plan import Plan
    from medsam2.data.read.catalog import Catalog
    from medsam2.data.read.reader import StepDataset
    from medsam2.data.settings import AugmentSettings

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    dataset = StepDataset(Plan([Catalog(shards)], settings_of(shards, objects), 0, CLIPS))
    workers = DataLoader(Timed(dataset), batch_size=None, sampler=range(batches), num_workers=1, collate_fn=_as_is)  # type: ignore[arg-type]
    in_worker = list(workers)

    def memory() -> float:
        before = peak_mb()
        for step in range(batches):
            dataset[step]
        return peak_mb() - before

    memory_mb = memory()  # before anything else raises the peak
    configs = Path(__file__).resolve().parents[1] / "configs" / "augment" / "default.yaml"
    augment = Augment(AugmentSettings(**yaml.safe_load(configs.read_text())), 512)
    read, changed = [], []
    for step in range(batches):
        batch, milliseconds = timed(lambda step=step: dataset[step])
        assert batch.num_objects == CLIPS * objects
        read.append(milliseconds)
        changed.append(timed(lambda batch=batch: augment(batch))[1])
    print(
        json.dumps(
            {
                "read": read,
                "augment": changed,
                "memory_mb": memory_mb,
                "in_worker": [ms for ms, _ in in_worker[1:]],
                "worker_memory_mb": max(mb for _, mb in in_worker),
            }
        )
    )


def _as_is(item: Any) -> Any:
    return item


if __name__ == "__main__":
    main()
