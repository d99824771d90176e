"""The machine's memory: what this process holds, and what is left, of the machine or of the container."""

from __future__ import annotations

import ctypes
from pathlib import Path

GIB = 2**30


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    return _status("/proc/self/status", "VmRSS:")


def reset_peak() -> None:
    """Let `peak` begin anew; where the system does not allow it, `peak` is that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def trim() -> None:
    """Give memory that was freed back to the system (glibc keeps it), so that it is not measured as used."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


def peak() -> int:
    """The most bytes that this process held since `reset_peak`."""
    return _status("/proc/self/status", "VmHWM:")


def available() -> int:
    """Bytes that can still be used: of the machine, or of the container where that has a limit."""
    found = [_status("/proc/meminfo", "MemAvailable:")]
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        found.append(limit - used)
    return max(min(found), 0)


def _status(path: str, name: str) -> int:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
