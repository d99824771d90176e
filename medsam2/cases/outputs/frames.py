"""A folder of PNG masks in the palette of the DAVIS data set: palette index (or 16-bit grey) = label value."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medsam2.cases.outputs.masks import Masks

NAME = "frames"
WRITES = "a folder of PNG masks, DAVIS palette"
ENDINGS: tuple[str, ...] = ()
DEFAULT_FOR = ("frames", "video", "dicom_multiframe")


def write(path: Path, masks: Masks) -> None:
    """One PNG a slice of the source's own array, under the name of the frame that it belongs to where it has one."""
    count = masks.shape[masks.orientation.axes.index(0)]
    stems = masks.stems if len(masks.stems) == count else tuple(f"{number:05d}" for number in range(count))
    for stem, labels in zip(stems, masks.source_slices(), strict=True):
        save(path / f"{stem}.png", labels)


def save(path: Path, labels: np.ndarray) -> None:
    """Label values [H, W] as one PNG."""
    from PIL import Image

    from medsam2.cases.phantoms.write import palette

    picture = Image.fromarray(np.ascontiguousarray(labels))
    if labels.dtype == np.uint8:
        picture.putpalette(palette())
    picture.save(path, compress_level=3)
