"""Find the output format for a name or path, and write masks so that a result is complete or absent.

To add a format, add one file here with `OUTPUTS`, a tuple of the formats that it writes (see `masks.Output`).
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

DEFAULT_FORMAT = "nifti"


@cache
def outputs() -> dict[str, Output]:
    """Return every output format by name."""
    return {output.name: output for module in modules_of(__package__, offers="OUTPUTS") for output in module.OUTPUTS}


def find_output(name: str) -> Output:
    """Return the format of this name.

    Raises:
        UserError: there is none; the message suggests the closest name.
    """
    check_choice("--format", name, outputs())
    return outputs()[name]


def ending_of(path: Path, output: Output) -> str:
    """Return the longest ending of `output` that `path` has, or ""."""
    name = path.name.lower()
    return next((e for e in sorted(output.endings, key=len, reverse=True) if name.endswith(e)), "")


def output_for(path: Path, source: str) -> tuple[Output, bool]:
    """Return the format for masks at `path`, and whether `path` is the file itself rather than its folder.

    Args:
        source: kind of the input: an ending of a volume file (".nrrd"), or a name of `formats` ("dicom_series").
    """
    by_ending = next((entry for entry in outputs().values() if ending_of(path, entry)), None)
    default = next((entry for entry in outputs().values() if source in entry.default_for), outputs()[DEFAULT_FORMAT])
    return by_ending or default, by_ending is not None


def check_free(path: Path, output: Output, force: bool) -> None:
    """Check that `path` may be written.

    Raises:
        UserError: it exists and `force` is off, or it holds something that this format does not write.
    """
    if not path.exists():
        parent = path.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise UserError(f"{path} cannot be written: {parent} is a file; choose another name.")
        return
    if path.is_dir() == bool(output.endings):
        conflict = "a folder, but one file" if path.is_dir() else "a file, but a folder"
        raise UserError(f"{path} is {conflict} is written as {output.name}; choose another name.")
    if path.is_dir():
        entries = list(path.iterdir())
        foreign = next((entry.name for entry in entries if entry.suffix.lower() != ".png"), None)
        if foreign is not None:
            raise UserError(f"{path} holds {foreign}, which is not a mask frame; choose a new folder.")
        if not entries:
            return
    if not force:
        raise UserError(f"{path} already exists; choose another name, or replace it with --force.")


def write_masks(output: Output, path: Path, masks: Masks, force: bool = False) -> None:
    """Write `masks` to `path`; if writing fails, `path` stays as it was.

    Raises:
        UserError: `path` may not be written, or the format cannot hold these masks.
    """
    check_free(path, output, force)
    output.check(masks)
    path.parent.mkdir(parents=True, exist_ok=True)
    target = atomic_path(path, ending_of(path, output)) if output.endings else _atomic_folder(path)
    with target as temporary:
        output.write(temporary, masks)


@contextmanager
def _atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` and rename it to `path` on success; on failure an old folder is restored."""
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
