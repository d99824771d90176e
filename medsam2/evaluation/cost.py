"""What a prediction costs: wall time and peak memory."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import TracebackType

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Cost:
    """A context manager that measures what happens inside it.

    Attributes:
        seconds: wall time.
        peak_mb: most memory held meanwhile, in MB (1e6 bytes): what torch allocated on a CUDA device; elsewhere the
            resident memory of the whole process, model and case included; NaN where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = self.peak_mb = math.nan

    def __enter__(self) -> Cost:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._forgets = _forget_peak()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_mb = torch.cuda.max_memory_allocated(self.device) / 1e6
        elif self._forgets:
            self.peak_mb = _peak_mb()
        self.seconds = time.perf_counter() - self._start


def _forget_peak() -> bool:
    """Let the system count the peak of resident memory anew; False where it cannot."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return _STATUS.is_file()


def _peak_mb() -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return math.nan
