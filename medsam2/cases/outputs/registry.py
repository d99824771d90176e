"""Which mask formats are written, the one that a name asks for, and writing so that a result is whole or absent.

To add a format, add one file here with `NAME`, `WRITES` (a line for the help), `ENDINGS` (of file names; none where a
folder is written), `DEFAULT_FOR` (inputs whose masks it is for unless the user says otherwise: an ending, or a name of
`formats`) and `write(path, masks) -> None`, and where it cannot hold everything `check(masks) -> None`, which raises a
`UserError` before anything is predicted. `path` does not exist and has one of the endings; renaming the result into
place, and refusing to replace what is there, is done here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Protocol

from medsam2.cases.outputs.masks import Masks
from medsam2.errors import UserError, did_you_mean
from medsam2.files import atomic_path, sync_folder
from medsam2.plugins import by_name, modules_of

FALLBACK = "nifti"


class Output(Protocol):
    """What a format's module offers."""

    NAME: str
    WRITES: str
    ENDINGS: tuple[str, ...]
    DEFAULT_FOR: tuple[str, ...]

    def write(self, path: Path, masks: Masks) -> None: ...


@cache
def outputs() -> dict[str, Output]:
    """Every format by name, one a file of this folder.

    Raises:
        RuntimeError: two files claim one name.
    """
    return by_name(modules_of(__package__, offers="WRITES"), "outputs")


def find_output(name: str) -> Output:
    """The format of this name.

    Raises:
        UserError: there is none; the message has the closest.
    """
    if name not in outputs():
        known = ", ".join(outputs())
        raise UserError(f"--format {name!r} is not one of {known}.{did_you_mean(name, outputs())}")
    return outputs()[name]


def ending_of(path: Path, output: Output) -> str:
    """The ending of `path` that belongs to `output`, or ""."""
    name = path.name.lower()
    return next((e for e in sorted(output.ENDINGS, key=len, reverse=True) if name.endswith(e)), "")


def output_for(path: Path, source: str) -> tuple[Output, bool]:
    """The format for masks at `path` and whether `path` names the file itself (else the folder around it).

    Args:
        source: what the input is: an ending of a volume file (".nrrd"), or a name of `formats` ("dicom_series").
    """
    for entry in outputs().values():
        if ending_of(path, entry):
            return entry, True
    for entry in outputs().values():
        if source in entry.DEFAULT_FOR:
            return entry, False
    return outputs()[FALLBACK], False


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
    if path.is_dir() == bool(output.ENDINGS):
        what = "a folder, but one file" if path.is_dir() else "a file, but a folder"
        raise UserError(f"{path} is {what} is written as {output.NAME}; choose another name.")
    if path.is_dir():
        entries = list(path.iterdir())
        foreign = next((entry.name for entry in entries if entry.suffix.lower() != ".png"), None)
        if foreign is not None:
            raise UserError(f"{path} holds {foreign}, which is no mask frame; choose a folder that does not exist yet.")
        if not entries:
            return
    if not force:
        raise UserError(f"{path} already exists; choose another name, or replace it with --force.")


def check_masks(output: Output, masks: Masks) -> None:
    """Whether the format can hold these masks, whatever is predicted.

    Raises:
        UserError: it cannot.
    """
    check = getattr(output, "check", None)
    if check is not None:
        check(masks)


def write_masks(output: Output, path: Path, masks: Masks, force: bool = False) -> None:
    """Write `masks` at `path`, which is complete afterwards, or as it was where anything fails.

    Raises:
        UserError: `path` is taken, or the format cannot hold these masks.
    """
    check_free(path, output, force)
    check_masks(output, masks)
    path.parent.mkdir(parents=True, exist_ok=True)
    place = atomic_path(path, ending_of(path, output)) if output.ENDINGS else _atomic_folder(path)
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
