"""Which file formats exist, and the one that reads a path.

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
    """What a format's module offers."""

    NAME: str
    READS: str

    def recognises(self, path: Path) -> bool: ...

    def read(self, path: Path, settings: DatasetSettings) -> Raster: ...

    def read_mask(self, path: Path, settings: DatasetSettings) -> MaskRaster: ...


@cache
def formats() -> dict[str, Format]:
    """Every format by name, one a file of this folder.

    Raises:
        RuntimeError: two files claim one name.
    """
    return by_name(modules_of(__package__, offers="recognises"), "formats")


def format_of(path: Path) -> Format | None:
    """The format that reads `path`, or None."""
    return next((entry for entry in formats().values() if entry.recognises(path)), None)


def read_image(path: Path, settings: DatasetSettings) -> Raster:
    """The image in a file or folder, whatever its format."""
    return _known(path).read(path, settings)


def read_mask(path: Path, settings: DatasetSettings) -> MaskRaster:
    """The label planes in a file or folder, whatever its format."""
    return _known(path).read_mask(path, settings)


def _known(path: Path) -> Format:
    check_readable(path)
    found = format_of(path)
    if found is None:
        reads = "; ".join(entry.READS for entry in formats().values())
        raise CaseError(f"{path}: no known format. Read are {reads}.")
    return found
