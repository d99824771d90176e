"""Which mask formats are written, the one that a name asks for, and writing so that a result is whole or absent.

To add a format, add one file here with `OUTPUTS`, the formats that it writes (see `masks.Output`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from medsam2.cases.outputs.masks import Masks, Output
from medsam2.errors import UserError, check_choice
from medsam2.files import atomic_path, sync_folder
from medsam2.plugins import modules_of

FALLBACK = "nifti"


@cache
def outputs() -> dict[str, Output]:
    """Every format by name."""
    return {output.name: output for module in modules_of(__package__, offers="OUTPUTS") for output in module.OUTPUTS}


def find_output(name: str) -> Output:
    """The format of this name.

    Raises:
        UserError: there is none; the message has the closest.
    """
    check_choice("--format", name, outputs())
    return outputs()[name]


def ending_of(path: Path, output: Output) -> str:
    """The ending of `path` that belongs to `output`, or ""."""
    name = path.name.lower()
    return next((e for e in sorted(output.endings, key=len, reverse=True) if name.endswith(e)), "")


def output_for(path: Path, source: str) -> tuple[Output, bool]:
    """The format for masks at `path` and whether `path` names the file itself (else the folder around it).

    Args:
        source: what the input is: an ending of a volume file (".nrrd"), or a name of `formats` ("dicom_series").
    """
    named = next((entry for entry in outputs().values() if ending_of(path, entry)), None)
    default = next((entry for entry in outputs().values() if source in entry.default_for), outputs()[FALLBACK])
    return named or default, named is not None


def check_free(path: Path, output: Output, force: bool) -> None:
    """Whether `path` may be written.

    Raises:
        UserError: it exists and `force` is off, or it is something that this format would never have written.
    """
    if not path.exists():
        parent = path.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise UserError(f"{path} cannot be written: {parent} is a file; choose another name.")
        return
    if path.is_dir() == bool(output.endings):
        what = "a folder, but one file" if path.is_dir() else "a file, but a folder"
        raise UserError(f"{path} is {what} is written as {output.name}; choose another name.")
    if path.is_dir():
        entries = list(path.iterdir())
        foreign = next((entry.name for entry in entries if entry.suffix.lower() != ".png"), None)
        if foreign is not None:
            raise UserError(f"{path} holds {foreign}, which is no mask frame; choose a folder that does not exist yet.")
        if not entries:
            return
    if not force:
        raise UserError(f"{path} already exists; choose another name, or replace it with --force.")


def write_masks(output: Output, path: Path, masks: Masks, force: bool = False) -> None:
    """Write `masks` at `path`, which is complete afterwards, or as it was where anything fails.

    Raises:
        UserError: `path` is taken, or the format cannot hold these masks.
    """
    check_free(path, output, force)
    output.check(masks)
    path.parent.mkdir(parents=True, exist_ok=True)
    place = atomic_path(path, ending_of(path, output)) if output.endings else _atomic_folder(path)
    with place as temporary:
        output.write(temporary, masks)


@contextmanager
def _atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its place on success; an old one is set aside until then."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        temporary.mkdir()
        yield temporary
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            os.replace(old, path)
