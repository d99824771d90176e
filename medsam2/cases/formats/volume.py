"""NIfTI, NRRD, MHA/MHD (and 2-D stills) through SimpleITK, onto a canonical grid sliced along the coarsest axis."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.formats.limits import MAX_BYTES, check_readable, check_size
from medsam2.cases.formats.nifti import read_voxels
from medsam2.cases.geometry import CaseWarning, align_mask, canonical, geometry_of, slicing_code

if TYPE_CHECKING:
    import SimpleITK as sitk

READERS = {
    ".nii.gz": "NiftiImageIO",
    ".nii": "NiftiImageIO",
    ".nrrd": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}


@dataclass(frozen=True, eq=False)
class Volume:
    """An image and its masks on one grid.

    Attributes:
        image: [T, H, W] or [T, H, W, 3] native type. masks: one [T, H, W] integer array for each mask file.
        spacing: (z, y, x) mm. affine: RAS+ [4, 4], index (x, y, z) -> mm, or None where the file has none.
    """

    image: np.ndarray
    masks: tuple[np.ndarray, ...]
    spacing: tuple[float, float, float]
    affine: np.ndarray | None


def read_volume(image_path: Path, mask_paths: tuple[Path, ...] = (), limit: int = MAX_BYTES) -> Volume:
    """Read an image with its masks, bring the masks onto its grid and orient both.

    Raises:
        CaseError: unreadable or truncated file, non-finite voxels, or geometry that cannot be reconciled.
    """
    import SimpleITK as sitk

    image, located = read_image(image_path, limit)
    code = slicing_code(image)
    masks = []
    for path in mask_paths:
        mask, mask_located = read_image(path, limit)
        both = located and mask_located
        aligned, report = align_mask(_integer(mask, path), image, path, image_path, both)
        if report:
            warnings.warn(report, CaseWarning, stacklevel=2)
        if not both:
            aligned.CopyInformation(image)
        masks.append(sitk.GetArrayFromImage(canonical(aligned, code)))
    image = canonical(image, code)
    array = sitk.GetArrayFromImage(image)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise CaseError(f"{image_path}: {bad} voxels are NaN or infinite; replace them before preparing.")
    x, y, z = image.GetSpacing()
    return Volume(array, tuple(masks), (z, y, x), geometry_of(image).affine if located else None)


def read_image(path: Path, limit: int = MAX_BYTES) -> tuple[sitk.Image, bool]:
    """One 3-D image (2-D becomes one slice), and whether the file says where its voxels lie.

    The size is checked against `limit` before anything is unpacked. A NIfTI with both codes zero, or a PNG, says
    nothing of where it lies.
    """
    import SimpleITK as sitk

    check_readable(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    nifti = path.name.lower().endswith((".nii", ".nii.gz"))
    for ending, name in READERS.items():
        if path.name.lower().endswith(ending):
            reader.SetImageIO(name)  # else every reader of the library is asked, for some 5 ms a file
    array = read_voxels(path, limit) if nifti else None
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise CaseError(f"{path}: not readable as an image ({_last_line(error)}); copy or export it again.") from None
    if array is None:
        return _execute(reader, path, limit), reader.GetDimension() == 3
    image = sitk.GetImageFromArray(array, isVector=array.ndim == 4)
    rank = min(3, reader.GetDimension())
    spacing, origin, direction = np.ones(3), np.zeros(3), np.eye(3)
    spacing[:rank], origin[:rank] = reader.GetSpacing()[:rank], reader.GetOrigin()[:rank]
    full = np.reshape(reader.GetDirection(), (reader.GetDimension(), reader.GetDimension()))
    direction[:rank, :rank] = full[:rank, :rank]
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise CaseError(f"{path}: spacing {tuple(spacing.tolist())} must be positive; mend the header.")
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(origin.tolist())
    image.SetDirection(direction.ravel().tolist())
    codes = [reader.GetMetaData(k) for k in ("qform_code", "sform_code") if reader.HasMetaDataKey(k)]
    return image, rank == 3 and any(int(float(code or 0)) > 0 for code in codes)


def _execute(reader: sitk.ImageFileReader, path: Path, limit: int) -> sitk.Image:
    """What SimpleITK reads itself (NRRD, MetaImage, PNG): these readers notice a file that is cut short."""
    import SimpleITK as sitk

    size, dimension = reader.GetSize(), reader.GetDimension()
    if any(n != 1 for n in size[3:]):
        raise CaseError(f"{path}: {dimension}-D image of size {size}; split it into 3-D files.")
    width = sitk.Image([1] * dimension, reader.GetPixelID()).GetSizeOfPixelComponent()
    check_size(path, math.prod(size) * reader.GetNumberOfComponents() * width, limit)
    try:
        image = reader.Execute()
    except (RuntimeError, MemoryError) as error:
        found = path.stat().st_size
        raise CaseError(
            f"{path}: damaged or cut short: its header promises {size} voxels, which its {found} bytes do not give "
            f"({_last_line(error)}); copy it again."
        ) from None
    if dimension == 4:
        image = image[:, :, :, 0]
    elif dimension == 2:
        image = sitk.JoinSeries(image)
    if image.GetNumberOfComponentsPerPixel() not in (1, 3):
        raise CaseError(f"{path}: {image.GetNumberOfComponentsPerPixel()} values a voxel; expected grey or RGB.")
    return image


def _integer(mask: sitk.Image, path: Path) -> sitk.Image:
    """The mask as unsigned integers (uint8, or uint16 where a label exceeds 255); fractions and negatives refused."""
    import SimpleITK as sitk

    if mask.GetNumberOfComponentsPerPixel() != 1:
        raise CaseError(f"{path}: a mask must have one value a voxel, found {mask.GetNumberOfComponentsPerPixel()}.")
    if mask.GetPixelID() in (sitk.sitkUInt8, sitk.sitkUInt16):
        return mask
    array = sitk.GetArrayViewFromImage(mask)
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > np.iinfo(np.uint16).max:
        raise CaseError(f"{path}: label values {low}..{high} must lie between 0 and 65535.")
    if array.dtype.kind == "f" and not np.array_equal(array, np.rint(array)):
        raise CaseError(f"{path}: the mask holds fractions, e.g. a probability map; threshold it first.")
    return sitk.Cast(mask, sitk.sitkUInt8 if high < 256 else sitk.sitkUInt16)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
