"""The way back: a mask on the upright grid of a `Case`, written on the grid of the file that it came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medsam2.cases.case import Orientation
from medsam2.cases.geometry import itk_from_affine, source_affine


def to_source(
    mask: np.ndarray, orientation: Orientation, affine: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Mask [T, H, W] as [Z, Y, X] of the source, with the source's own RAS+ affine; no voxel is interpolated."""
    shape = (mask.shape[0], mask.shape[1], mask.shape[2])
    source = orientation.undo(mask)
    return source, None if affine is None else source_affine(affine, shape, orientation)


def enlarge(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Mask [T, h, w] of reduced frames on the full frame [T, H, W], nearest neighbour."""
    if mask.shape[1:] == (height, width):
        return mask
    rows = ((np.arange(height) + 0.5) * mask.shape[1] / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * mask.shape[2] / width).astype(np.int64)
    return np.ascontiguousarray(mask[:, rows[:, None], columns[None, :]])


def write_mask(
    path: Path,
    mask: np.ndarray,
    orientation: Orientation,
    affine: np.ndarray | None,
    spacing: tuple[float, float, float],
) -> None:
    """Write [T, H, W] as a volume file on the grid of the source: NIfTI, NRRD or MHA by the ending of `path`.

    Args:
        affine: of the turned grid (`Case.affine`). spacing: (z, y, x) of the turned grid, used where affine is None.
    """
    import SimpleITK as sitk

    array, native = to_source(mask, orientation, affine)
    image = sitk.GetImageFromArray(array)
    if native is not None:
        sizes, direction, origin = itk_from_affine(native)
        image.SetSpacing(sizes)
        image.SetDirection(direction)
        image.SetOrigin(origin)
    else:
        z, y, x = (spacing[orientation.axes.index(axis)] for axis in range(3))
        image.SetSpacing((x, y, z))
    sitk.WriteImage(image, str(path), True)
