"""What a prediction costs: wall time and peak memory."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""Written to `RESET`, it makes Linux count the peak of resident memory anew."""


@dataclass
class Cost:
    """What happened inside `measure_cost`, once it has ended.

    Attributes:
        seconds: wall time.
        peak_mb: most memory held meanwhile, in MB (1e6 bytes): what torch allocated on a CUDA device; elsewhere the
            resident memory of the whole process, model and case included; NaN where the system does not tell.
    """

    seconds: float = math.nan
    peak_mb: float = math.nan


@contextmanager
def measure_cost(device: torch.device) -> Iterator[Cost]:
    """Measure the time and memory of what happens inside."""
    cost, on_gpu = Cost(), device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # not Linux, or a sandbox that forbids it: the peak is then that of the whole run
        RESET.write_text(RESET_PEAK)
    start = time.perf_counter()
    yield cost
    if on_gpu:
        torch.cuda.synchronize(device)
        cost.peak_mb = torch.cuda.max_memory_allocated(device) / 1e6
    elif STATUS.exists():
        peaks = [line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        cost.peak_mb = int(peaks[0]) * 1024 / 1e6 if peaks else math.nan
    cost.seconds = time.perf_counter() - start
