"""Find the file format that reads a path.

To add a format, add one file here with `NAME`, `READS`, `recognises(path) -> bool` (by name or first bytes, cheap) and
`read(path, settings) -> Raster`, `read_mask(path, settings) -> MaskRaster`. All raise `CaseError` that names the file,
what was found and the remedy, refuse what unpacks beyond the limit (`raster.MAX_UNPACKED_BYTES`), and never unpickle.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Protocol

from medsam2.cases.case import CaseError
from medsam2.cases.raster import MaskRaster, Raster, check_readable
from medsam2.cases.settings import DatasetSettings
from medsam2.plugins import by_name, modules_of


class Format(Protocol):
    """The interface of a format's module."""

    NAME: str
    READS: str

    def recognises(self, path: Path) -> bool: ...

    def read(self, path: Path, settings: DatasetSettings) -> Raster: ...

    def read_mask(self, path: Path, settings: DatasetSettings) -> MaskRaster: ...


@cache
def formats() -> dict[str, Format]:
    """Return every format by name; each file of this folder is one.

    Raises:
        RuntimeError: two files claim one name.
    """
    return by_name(modules_of(__package__, offers="recognises"), "formats")


def find_format(path: Path) -> Format | None:
    """Return the format that reads `path`, or None."""
    return next((entry for entry in formats().values() if entry.recognises(path)), None)


def read_image(path: Path, settings: DatasetSettings) -> Raster:
    """Read the image in a file or folder of any format."""
    return _require_format(path).read(path, settings)


def read_mask(path: Path, settings: DatasetSettings) -> MaskRaster:
    """Read the label planes in a file or folder of any format."""
    return _require_format(path).read_mask(path, settings)


def _require_format(path: Path) -> Format:
    check_readable(path)
    file_format = find_format(path)
    if file_format is None:
        supported = "; ".join(entry.READS for entry in formats().values())
        raise CaseError(f"{path}: no known format. Supported formats: {supported}.")
    return file_format
