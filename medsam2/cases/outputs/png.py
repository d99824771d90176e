"""One PNG for one picture, in the palette of the DAVIS data set."""

from __future__ import annotations

from pathlib import Path

from medsam2.cases.outputs.frames import save
from medsam2.cases.outputs.masks import Masks
from medsam2.errors import UserError

NAME = "png"
WRITES = "one PNG mask (.png), for one picture"
ENDINGS = (".png",)
DEFAULT_FOR = ("picture",)


def check(masks: Masks) -> None:
    """Refuse a volume or clip.

    Raises:
        UserError: there is more than one slice or frame.
    """
    if masks.shape[0] != 1:
        raise UserError(
            f"{masks.where}: has {masks.shape[0]} slices or frames, a PNG holds one; give a folder and say --format "
            "frames."
        )


def write(path: Path, masks: Masks) -> None:
    """The label values of the one slice."""
    save(path, next(masks.source_slices()))
