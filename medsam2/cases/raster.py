"""What a format reader returns: voxels in the order of the file, with their geometry, and label planes.

A limit on the unpacked size of a file refuses decompression bombs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medsam2.cases.case import CaseError, Label
from medsam2.cases.settings import Window

MAX_UNPACKED_BYTES = 8 << 30
"""Limit on the uncompressed size of one file or one clip."""


@dataclass(frozen=True, eq=False)
class Raster:
    """An image as a format reads it, with axes in the order of the file.

    Attributes:
        array: [Z, Y, X] or [Z, Y, X, 3] in the native type; finite. Z are slices, or frames in time if `moving`.
        spacing: (z in mm, or seconds if `moving`; y, x in mm); 1.0 if unknown.
        path: the file or folder, for messages.
        affine: RAS+ [4, 4], index (x, y, z) to mm, or None if the file has no geometry.
        moving: whether Z is time.
        window: (low, high) stored in the file (DICOM), or None.
    """

    array: np.ndarray
    spacing: tuple[float, float, float]
    path: Path
    affine: np.ndarray | None = None
    moving: bool = False
    window: Window | None = None


@dataclass(frozen=True, eq=False)
class MaskRaster:
    """Label planes as a format reads them.

    Attributes:
        planes: [P, Z, Y, X] unsigned integers, or float if the file holds fractions, which need a `threshold`;
            P > 1 only if objects overlap.
        path: the file or folder. affine: as in `Raster`.
        labels: stored in the file (DICOM-SEG, COCO); empty for other formats.
        lossy: whether the format alters values (JPEG), so that they need a threshold.
    """

    planes: np.ndarray
    path: Path
    affine: np.ndarray | None = None
    labels: tuple[Label, ...] = ()
    lossy: bool = False

    @property
    def exact(self) -> bool:
        """Whether the values are label ids: neither fractions nor altered by the format."""
        return not self.lossy and self.planes.dtype.kind != "f"


def check_size(path: Path, size: int) -> None:
    """Refuse a file whose content would take more than `MAX_UNPACKED_BYTES` in memory.

    Raises:
        CaseError: names the file, its declared size and the limit.
    """
    if size > MAX_UNPACKED_BYTES:
        raise CaseError(
            f"{path}: unpacks to {size / 2**30:.2f} GiB, more than the limit of {MAX_UNPACKED_BYTES / 2**30:.2f} GiB; "
            "crop or split it, or check that the file is genuine."
        )


def check_readable(path: Path) -> None:
    """Refuse a path that is missing, empty or without read permission, with a clearer message than libraries give."""
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


@contextmanager
def explain(path: Path, fault: str, remedy: str, quote: bool = True) -> Iterator[None]:
    """Turn any exception of a library on a damaged file into a `CaseError` that names the file.

    Args:
        quote: whether to show the library's message; that of a DICOM library may quote a patient's data.
    """
    try:
        yield
    except (CaseError, MemoryError):
        raise
    except Exception as error:  # libraries raise many kinds
        what = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise CaseError(f"{path}: {fault} ({what if quote else type(error).__name__}); {remedy}.") from None


def read_json(path: Path) -> Any:
    """Read a json file.

    Raises:
        CaseError: the file is not valid json; the message gives the position.
    """
    with explain(path, "not readable as json", "correct it"):
        return json.loads(path.read_text(encoding="utf-8"))
