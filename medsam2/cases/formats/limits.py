"""A stated limit on what one file may unpack to, so that a decompression bomb is refused (FAULTS row 22)."""

from __future__ import annotations

from pathlib import Path

from medsam2.cases.case import CaseError

MAX_BYTES = 8 << 30
"""Uncompressed bytes that one file (or one clip) may hold."""


def check_size(path: Path, size: int, limit: int = MAX_BYTES) -> None:
    """Refuse a file whose content would take more than `limit` bytes in memory.

    Raises:
        CaseError: naming the file, the size that it declares and the limit.
    """
    if size > limit:
        raise CaseError(
            f"{path}: unpacks to {size / 2**30:.2f} GiB, more than the limit of {limit / 2**30:.2f} GiB; "
            "crop or split it, or check that it is what it claims to be."
        )


def check_readable(path: Path) -> None:
    """Refuse a path that is missing, empty or without read permission, before a library gives a worse message."""
    if not path.exists():
        raise CaseError(f"{path}: no such file.")
    if path.is_file() and path.stat().st_size == 0:
        raise CaseError(f"{path}: the file is empty (0 bytes); copy it again.")
    try:
        if path.is_file():
            with open(path, "rb") as file:
                file.read(1)
    except PermissionError:
        raise CaseError(f"{path}: no permission to read it; change its mode or owner.") from None
