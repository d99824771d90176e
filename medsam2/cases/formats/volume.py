"""NIfTI, NRRD, MHA and MHD: 3-D scans, and 4-D ones as clips in time or as channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.formats.nifti import nifti_shape, read_voxels, seconds_a_unit
from medsam2.cases.geometry import affine_from_itk
from medsam2.cases.raster import MAX_BYTES, MaskRaster, Raster, check_readable, check_size
from medsam2.cases.settings import DatasetSettings
from medsam2.cases.values import as_labels

if TYPE_CHECKING:
    import SimpleITK as sitk

NAME = "volume"
READS = "NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd)"
READERS = {
    ".nii.gz": "NiftiImageIO",
    ".nii": "NiftiImageIO",
    ".nrrd": "NrrdImageIO",
    ".nhdr": "NrrdImageIO",
    ".mha": "MetaImageIO",
    ".mhd": "MetaImageIO",
}


@dataclass(frozen=True, eq=False)
class Grid:
    """An array as the file has it, and where it lies.

    `array`: [Z, Y, X], [Z, Y, X, 3], or [N, Z, Y, X] of a 4-D file (`fourth`). `spacing`: (z, y, x) mm. `step`: of the
    fourth axis in seconds, 1.0 where unknown. `affine`: RAS+ or None where the file does not say.
    """

    array: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray | None
    fourth: bool
    step: float


def recognises(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(tuple(READERS))


def read(path: Path, settings: DatasetSettings) -> Raster:
    """A 3-D scan.

    Raises:
        CaseError: unreadable or cut short, too large, 4-D, or an impossible spacing.
    """
    grid = read_grid(path)
    if grid.fourth:
        raise CaseError(
            f"{path}: 4-D image of shape {grid.array.shape}, where one volume is expected; as a series in time give "
            "it a 4-D mask, else split it into 3-D files."
        )
    return Raster(grid.array, grid.spacing, path, grid.affine)


def read_mask(path: Path, settings: DatasetSettings) -> MaskRaster:
    """A 3-D label map as one plane; fractions stay for `threshold` to decide."""
    grid = read_grid(path)
    if grid.fourth or grid.array.ndim != 3:
        raise CaseError(f"{path}: a mask must be 3-D with one value a voxel, found shape {grid.array.shape}.")
    return MaskRaster(as_labels(grid.array, path)[None], path, grid.affine)


def time_slices(path: Path) -> int:
    """How many slices a 4-D file has, each a clip in time; 0 for anything else. Reads the header alone."""
    if not recognises(path):
        return 0
    size = nifti_shape(path) if _is_nifti(path) else _header(path).GetSize()
    return int(size[2]) if len(size) > 3 and size[3] > 1 else 0


def read_time_slice(path: Path, z: int, settings: DatasetSettings) -> Raster:
    """Slice `z` of a 4-D file over time, [T, Y, X]; its spacing starts with seconds."""
    grid = _fourth(path, z, 1)
    return Raster(np.ascontiguousarray(grid.array[:, z]), (grid.step, *grid.spacing[1:]), path, moving=True)


def read_mask_time_slice(path: Path, z: int, settings: DatasetSettings) -> MaskRaster:
    """The labels of slice `z` of a 4-D file over time, as one plane [1, T, Y, X]."""
    grid = _fourth(path, z, 1)
    return MaskRaster(as_labels(np.ascontiguousarray(grid.array[:, z]), path)[None], path)


def read_channel(path: Path, index: int, settings: DatasetSettings) -> Raster:
    """Channel `index` of a 4-D file whose fourth axis are channels (BRATS of the Decathlon)."""
    grid = _fourth(path, index, 0)
    return Raster(np.ascontiguousarray(grid.array[index]), grid.spacing, path, grid.affine)


def _fourth(path: Path, index: int, axis: int) -> Grid:
    grid = read_grid(path)
    if not grid.fourth:
        raise CaseError(f"{path}: a 4-D image is expected, found shape {grid.array.shape}.")
    if not 0 <= index < grid.array.shape[axis]:
        raise CaseError(f"{path}: no index {index} on axis {axis} of its shape {grid.array.shape}.")
    return grid


def read_grid(path: Path, limit: int = MAX_BYTES) -> Grid:
    """One file, checked against `limit` before anything is unpacked.

    A NIfTI with both codes zero says nothing of where it lies.

    Raises:
        CaseError: unreadable, cut short, too large, not finite in its header, or of more than four dimensions.
    """
    nifti = _is_nifti(path)
    check_readable(path)
    array = read_voxels(path, limit) if nifti else None
    reader = _header(path)
    if array is None:
        array = _execute(reader, path, limit)
    rank = reader.GetDimension()
    spacing, origin, direction = np.ones(3), np.zeros(3), np.eye(3)
    low = min(3, rank)
    spacing[:low], origin[:low] = reader.GetSpacing()[:low], reader.GetOrigin()[:low]
    direction[:low, :low] = np.reshape(reader.GetDirection(), (rank, rank))[:low, :low]
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise CaseError(f"{path}: spacing {tuple(spacing.tolist())} must be positive; mend the header.")
    if not np.isfinite(origin).all() or abs(np.linalg.det(direction)) < 1e-3:
        raise CaseError(f"{path}: its origin or direction {direction.ravel().tolist()} is no grid; mend the header.")
    located = rank >= 3
    if nifti:
        codes = [reader.GetMetaData(k) for k in ("qform_code", "sform_code") if reader.HasMetaDataKey(k)]
        located = located and any(int(float(code or 0)) > 0 for code in codes)
    sizes = reader.GetSize()
    fourth = len(sizes) > 3 and sizes[3] > 1
    step = float(reader.GetSpacing()[3]) * (seconds_a_unit(path) if nifti else 1.0) if fourth else 1.0
    x, y, z = spacing.tolist()
    affine = affine_from_itk(spacing, direction.ravel(), origin) if located else None
    return Grid(array, (z, y, x), affine, fourth, step if math.isfinite(step) and step > 0 else 1.0)


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _header(path: Path) -> sitk.ImageFileReader:
    import SimpleITK as sitk

    check_readable(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    for ending, name in READERS.items():
        if path.name.lower().endswith(ending):
            reader.SetImageIO(name)  # else every reader of the library is asked, for some 5 ms a file
            break
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise CaseError(f"{path}: not readable as an image ({_last_line(error)}); copy or export it again.") from None
    return reader


def _execute(reader: sitk.ImageFileReader, path: Path, limit: int) -> np.ndarray:
    """What SimpleITK reads itself (NRRD, MetaImage): these readers notice a file that is cut short."""
    import SimpleITK as sitk

    size, dimension = reader.GetSize(), reader.GetDimension()
    if not 2 <= dimension <= 4:
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
    components = image.GetNumberOfComponentsPerPixel()
    if components not in (1, 3):
        raise CaseError(f"{path}: {components} values a voxel; expected grey or RGB.")
    array = sitk.GetArrayFromImage(image)
    if dimension == 2:
        array = array[None]
    elif dimension == 4 and size[3] == 1:
        array = array[0]
    return np.asarray(array)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
