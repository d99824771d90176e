"""The task of both sides of `train_step.py` (clip, weights in a file) and the measurement of one process."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

CORRECTIONS = 7


@dataclass(frozen=True)
class Work:
    """The task of one process.

    Attributes:
        weights: an official `.pt` of hiera tiny. side: of the square input, px. frames, objects: of the clip.
        dropout: of the memory attention. checkpoint: parts to recompute (ours). frozen: whether the encoder is frozen.
        half: bfloat16 autocast. steps: number of timed steps, after one that is not timed. device: "cpu" or "cuda".
    """

    weights: str
    side: int
    frames: int
    objects: int
    dropout: float = 0.0
    checkpoint: tuple[str, ...] = ()
    frozen: bool = False
    half: bool = False
    steps: int = 2
    device: str = "cpu"

    def text(self) -> str:
        return json.dumps(asdict(self))

    @property
    def corrected(self) -> list[int]:
        """The frames that receive corrections: the prompted one and the middle one."""
        return [0, self.frames // 2]


def given() -> Work:
    """Read the task from the command line."""
    values = json.loads(sys.argv[1])
    return Work(**{**values, "checkpoint": tuple(values["checkpoint"])})


def clip(work: Work) -> tuple[Any, Any]:
    """Make frames [T, 3, S, S] and masks bool [N, T, S, S] of moving bright squares."""
    import torch

    side = work.side
    frames = torch.randn(work.frames, 3, side, side, generator=torch.Generator().manual_seed(0)) * 0.3
    masks = torch.zeros(work.objects, work.frames, side, side, dtype=torch.bool)
    for n in range(work.objects):
        for t in range(work.frames):
            left, top = side // 10 + side * n // 4 + 2 * t, side // 8 + side * n // 6
            masks[n, t, top : top + side // 3, left : left + side // 4] = True
            frames[t] += masks[n, t]
    return frames.to(work.device), masks.to(work.device)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(work: Work, idle_mb: float, loss: Callable[[], Any], network: Any, optimizer: Any) -> None:
    """Run whole steps (loss, gradients, clipping, optimiser) and print seconds, memory above idle and last loss."""
    import torch

    cuda = work.device == "cuda"
    seconds, processor = [], []
    value = 0.0
    for step in range(work.steps + 1):
        wall, used = time.perf_counter(), cpu_seconds()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(work.device, torch.bfloat16, enabled=work.half):
            total = loss()
        total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1)
        optimizer.step()
        value = float(total.detach())
        if step:
            seconds.append(time.perf_counter() - wall)
            processor.append(cpu_seconds() - used)
    memory = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak_mb() - idle_mb
    print(json.dumps({"seconds": seconds, "cpu_seconds": processor, "memory_mb": memory, "loss": value}))
