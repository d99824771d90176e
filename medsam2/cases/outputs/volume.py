"""What NIfTI, NRRD and MetaImage share: one label map on the grid of the source."""

from __future__ import annotations

from pathlib import Path

from medsam2.cases.outputs.masks import Masks
from medsam2.cases.restore import write_mask


def write(path: Path, masks: Masks) -> None:
    """The label map with the source's own axes, spacing and place; the ending of `path` says in which format."""
    write_mask(path, masks.volume(), masks.orientation, masks.affine, masks.spacing)
