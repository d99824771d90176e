"""The task of both sides of `predict.py` (clip, boxes, weights in a file) and the measurement of one process."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """The task of one process.

    Attributes:
        weights: an official `.pt` of hiera tiny. side: of the square frames and of the model's input, px.
        frames, objects: of the clip; every object has a box on the middle frame.
        lesions: whether the official predictor restarts for each object and direction, as in MedSAM2's lesion script.
        half: bfloat16 autocast. runs: number of timed runs, after one that is not timed. device: "cpu" or "cuda".
        masks: where to write the masks (npy). count: count the operators of one frame instead of timing.
    """

    weights: str
    side: int
    frames: int
    objects: int
    lesions: bool = False
    half: bool = False
    runs: int = 1
    device: str = "cpu"
    masks: str = ""
    count: bool = False

    def text(self) -> str:
        return json.dumps(asdict(self))

    @property
    def middle(self) -> int:
        return self.frames // 2


def given() -> Work:
    """Read the task from the command line."""
    return Work(**json.loads(sys.argv[1]))


def clip(work: Work) -> tuple[Any, list[tuple[float, float, float, float]]]:
    """Make frames uint8 [T, 1, S, S] of moving bright squares, and each object's box on the middle frame."""
    import torch

    side = work.side
    frames = torch.randn(work.frames, 1, side, side, generator=torch.Generator().manual_seed(0)) * 20 + 90
    boxes = []
    for n in range(work.objects):
        for t in range(work.frames):
            left, top = side // 10 + side * n // 12 + t, side // 8 + side * n // 14
            frames[t, :, top : top + side // 5, left : left + side // 6] += 60
            if t == work.middle:
                boxes.append((float(left), float(top), float(left + side // 6), float(top + side // 5)))
    return frames.clamp(0, 255).to(torch.uint8), boxes


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(work: Work, idle_mb: float, predict: Callable[[], Any]) -> None:
    """Run `predict`, which returns bool masks [N, T, H, W], and print seconds and memory above idle."""
    import numpy as np
    import torch

    cuda = work.device == "cuda"
    seconds, processor = [], []
    for run in range(work.runs + 1):
        wall, used = time.perf_counter(), cpu_seconds()
        masks = predict()
        if cuda:
            torch.cuda.synchronize()
        if run:
            seconds.append(time.perf_counter() - wall)
            processor.append(cpu_seconds() - used)
    if work.masks:
        np.save(work.masks, masks.numpy())
    memory = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak_mb() - idle_mb
    print(json.dumps({"seconds": seconds, "cpu_seconds": processor, "memory_mb": memory}))


def count_operators(step: Callable[[], Any]) -> Counter[str]:
    """Count the operators that reach the dispatcher in `step`; on a GPU each computation is at least one launch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found[str(func)] += 1
            return func(*args, **(kwargs or {}))

    found: Counter[str] = Counter()
    with Counting():
        step()
    return found
