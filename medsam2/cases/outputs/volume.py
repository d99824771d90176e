"""Write NIfTI, NRRD and MetaImage: one label map on the grid of the source."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medsam2.cases.case import Orientation
from medsam2.cases.geometry import itk_from_affine, to_source
from medsam2.cases.outputs.masks import Masks, Output


def write(path: Path, masks: Masks) -> None:
    """Write the label map with the axes, spacing and affine of the source, in the format of the ending of `path`."""
    write_mask(path, masks.volume(), masks.orientation, masks.affine, masks.spacing)


def write_mask(
    path: Path,
    mask: np.ndarray,
    orientation: Orientation,
    affine: np.ndarray | None,
    spacing: tuple[float, float, float],
) -> None:
    """Write [T, H, W] as a volume file on the grid of the source: NIfTI, NRRD or MHA by the ending of `path`.

    Args:
        affine: affine of the turned grid (`Case.affine`). spacing: (z, y, x) of that grid, used if affine is None.
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


OUTPUTS = (
    Output("nifti", "NIfTI (.nii.gz, .nii)", (".nii.gz", ".nii"), (".nii.gz", ".nii", "npz"), write),
    Output("nrrd", "NRRD (.nrrd)", (".nrrd",), (".nrrd", ".nhdr"), write),
    Output("mha", "MetaImage (.mha)", (".mha",), (".mha", ".mhd"), write),
)
