"""Mask frames in colours, as EndoVis has them: every colour is a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.formats.picture import decode, decode_mask
from medsam2.cases.values import as_labels

Colour = tuple[int, int, int]


def picture_mode(path: Path) -> str:
    """How Pillow calls a picture's kind of pixels ("P", "L", "RGB" ...), from its header; "" where it is not one."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""  # whoever reads it says why


def read_colour_masks(paths: Sequence[Path], colours: Mapping[Colour, int]) -> np.ndarray:
    """[T, H, W] label values of mask frames in colours; frames that are grey already keep their values.

    Raises:
        CaseError: a colour that `colours` does not name, or masks of unequal size.
    """
    codes = np.array([(r << 16) | (g << 8) | b for r, g, b in colours], np.int64)
    order = np.argsort(codes)
    values = np.array(list(colours.values()), np.int64)[order]
    masks: list[np.ndarray] = []
    for path in paths:
        if picture_mode(path) not in ("RGB", "RGBA"):
            masks.append(as_labels(decode_mask(path, len(paths)), path))
        else:
            picture = decode(path, len(paths)).astype(np.int64)
            found = (picture[..., 0] << 16) | (picture[..., 1] << 8) | picture[..., 2]
            place = np.minimum(np.searchsorted(codes[order], found), codes.size - 1)
            unknown = found[codes[order][place] != found]
            if unknown.size:
                code = int(unknown[0])
                raise CaseError(
                    f"{path}: {unknown.size} pixels of colours that labels.json does not name, first "
                    f"{[code >> 16, code >> 8 & 255, code & 255]}; add it, or save the masks without smoothing."
                )
            masks.append(as_labels(values[place], path))
        if masks[-1].shape != masks[0].shape:
            raise CaseError(f"{path}: size {masks[-1].shape} differs from {masks[0].shape} of {paths[0].name}.")
    return np.stack(masks)
