"""Write PNG masks, one or a folder, in the DAVIS palette: the palette index (or 16-bit grey value) is the label."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from medsam2.cases.outputs.masks import Masks, Output
from medsam2.errors import UserError


def write(path: Path, masks: Masks) -> None:
    """Write one PNG per slice of the source array, named after its source frame, or numbered if it has no name."""
    count = masks.shape[masks.orientation.axes.index(0)]
    stems = masks.stems if len(masks.stems) == count else tuple(f"{number:05d}" for number in range(count))
    for stem, labels in zip(stems, masks.source_slices(), strict=True):
        save(path / f"{stem}.png", labels)


def check_single(masks: Masks) -> None:
    """Check that there is a single slice.

    Raises:
        UserError: there are several slices or frames.
    """
    if masks.shape[0] != 1:
        raise UserError(
            f"{masks.where}: has {masks.shape[0]} slices or frames, but a PNG holds one; give a folder and "
            "--format frames."
        )


def write_single(path: Path, masks: Masks) -> None:
    """Write the labels of the only slice."""
    save(path, next(masks.source_slices()))


def save(path: Path, labels: np.ndarray, compress_level: int = 3) -> None:
    """Write label values [H, W] as one PNG."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(labels))
    if labels.dtype == np.uint8:
        picture.putpalette(palette())
    picture.save(path, compress_level=compress_level)


@cache
def palette() -> tuple[int, ...]:
    """Return the colours of DAVIS mask files: 256 x (R, G, B) from the bits of the label."""
    colours = np.zeros((256, 3), int)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((np.arange(256) >> (3 * bit + channel)) & 1) << (7 - bit)
    return tuple(colours.ravel().tolist())


OUTPUTS = (
    Output("frames", "a folder of PNG masks, DAVIS palette", (), ("frames", "video", "dicom_multiframe"), write),
    Output("png", "one PNG mask (.png), for one picture", (".png",), ("picture",), write_single, check_single),
)
