"""What a file format gives: voxels in the order of the file, where they lie, masks beside them; and what it refuses.

A stated limit on what one file may unpack to lets a decompression bomb be refused.
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
"""Uncompressed bytes that one file (or one clip) may hold."""


@dataclass(frozen=True, eq=False)
class Raster:
    """An image as a format reads it, axes in the order of the file, nothing turned.

    Attributes:
        array: [Z, Y, X] or [Z, Y, X, 3] in the native type; finite. Z are slices, or frames in time if `moving`.
        spacing: (z in mm, or seconds if `moving`; y, x in mm); 1.0 where it is not known.
        path: the file or folder, for messages.
        affine: RAS+ [4, 4], index (x, y, z) -> mm, or None where the file says nothing of where it lies.
        moving: whether Z is time.
        window: (low, high) that the file itself asks for (DICOM), or None.
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
        planes: [P, Z, Y, X] unsigned integers (or float where the file holds fractions: `threshold` decides), P > 1
            only where objects overlap.
        path: the file or folder. affine: as in `Raster`.
        labels: that the file itself gives (DICOM-SEG, COCO); empty where it gives none.
        lossy: whether the format damages values (JPEG), so that they mean nothing without a threshold.
    """

    planes: np.ndarray
    path: Path
    affine: np.ndarray | None = None
    labels: tuple[Label, ...] = ()
    lossy: bool = False

    @property
    def exact(self) -> bool:
        """Whether the values are labels as they are: neither fractions nor damaged by the format."""
        return not self.lossy and self.planes.dtype.kind != "f"


def check_size(path: Path, size: int) -> None:
    """Refuse a file whose content would take more than `MAX_UNPACKED_BYTES` in memory.

    Raises:
        CaseError: naming the file, the size that it declares and the limit.
    """
    if size > MAX_UNPACKED_BYTES:
        raise CaseError(
            f"{path}: unpacks to {size / 2**30:.2f} GiB, more than the limit of {MAX_UNPACKED_BYTES / 2**30:.2f} GiB; "
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


@contextmanager
def explain(path: Path, fault: str, remedy: str, quote: bool = True) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into a `CaseError` that names the file.

    Args:
        quote: whether the error's own text may be shown; that of a DICOM library may quote a patient's data.
    """
    try:
        yield
    except (CaseError, MemoryError):
        raise
    except Exception as error:  # libraries raise many kinds
        what = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise CaseError(f"{path}: {fault} ({what if quote else type(error).__name__}); {remedy}.") from None


def read_json(path: Path) -> Any:
    """The content of a json file.

    Raises:
        CaseError: not valid json, with the position.
    """
    with explain(path, "not readable as json", "mend it"):
        return json.loads(path.read_text(encoding="utf-8"))
