"""MedSAM and MedSAM2 npz files: `imgs`, `gts`, and optionally `spacing`, `direction`, `origin`. Never unpickled."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.geometry import affine_from_itk
from medsam2.cases.raster import MaskRaster, Raster, check_readable, check_size, explain
from medsam2.cases.settings import DatasetSettings
from medsam2.cases.values import as_labels

NAME = "npz"
READS = "npz of MedSAM (.npz with imgs and gts)"


def recognises(path: Path) -> bool:
    return path.suffix.lower() == ".npz" and path.is_file()


def read(path: Path, settings: DatasetSettings) -> Raster:
    """Read the array `imgs`; `gts` may be missing, as in a scan that has no masks yet."""
    return read_npz(path, labelled=False)[0]


def read_mask(path: Path, settings: DatasetSettings) -> MaskRaster:
    """Read the array `gts` as one plane."""
    return read_npz(path)[1]


def array_names(path: Path) -> tuple[str, ...]:
    """List the arrays of an npz from its zip directory; empty if it is not an npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple(name.removesuffix(".npy") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return ()


def read_npz(path: Path, labelled: bool = True) -> tuple[Raster, MaskRaster]:
    """Read the image and the mask of one MedSAM npz.

    Args:
        labelled: whether `gts` is required; otherwise zeros replace a missing one.

    Raises:
        CaseError: missing, truncated, too large, pickled, without `imgs` or `gts`, or of unequal shapes.
    """
    arrays = read_arrays(path, ("imgs", "gts", "spacing", "direction", "origin"))
    for name in ("imgs", "gts") if labelled else ("imgs",):
        if name not in arrays:
            raise CaseError(f"{path}: no array {name!r} (found {', '.join(array_names(path)) or 'none'}).")
    image = arrays["imgs"]
    mask = arrays.get("gts", np.zeros(image.shape[: min(image.ndim, 3)], np.uint8))
    if image.ndim == 2:
        image, mask = image[None], mask.reshape((1, *mask.shape)) if mask.ndim == 2 else mask
    if mask.shape != image.shape[:3]:
        raise CaseError(f"{path}: gts of shape {mask.shape} for imgs of shape {image.shape}; they must be equal.")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise CaseError(f"{path}: imgs holds NaN or infinite voxels; replace them before preparing.")
    if mask.dtype.kind not in "iub":
        raise CaseError(f"{path}: gts must be integer, found {mask.dtype}.")
    spacing = np.ravel(arrays.get("spacing", np.ones(3))).astype(float)
    if spacing.shape != (3,) or not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise CaseError(f"{path}: spacing {spacing.tolist()} must be three positive numbers (x, y, z).")
    affine = None
    if "direction" in arrays and "spacing" in arrays:
        direction, origin = np.ravel(arrays["direction"]), np.ravel(arrays.get("origin", np.zeros(3)))
        if direction.shape != (9,) or origin.shape != (3,):
            raise CaseError(f"{path}: direction needs 9 numbers and origin 3, found {direction.size}, {origin.size}.")
        affine = affine_from_itk(spacing, direction, origin)
    x, y, z = spacing.tolist()
    return Raster(image, (z, y, x), path, affine), MaskRaster(as_labels(mask, path)[None], path, affine)


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read the arrays of the npz that are among `names`.

    Raises:
        CaseError: the file is missing, damaged, larger than the limit when unpacked, or an array is pickled.
    """
    check_readable(path)
    fault = f"damaged or cut short at {path.stat().st_size} bytes"
    with explain(path, fault, "copy it again"), zipfile.ZipFile(path) as archive:
        check_size(path, sum(info.file_size for info in archive.infolist()))
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        return {name: _read_member(archive, members[name], path) for name in names if name in members}


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    content = archive.read(info)  # reading to the end verifies the checksum
    try:
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, MemoryError) as error:
        raise CaseError(
            f"{path}: array {info.filename} is pickled, which may run code, or has no valid header ({error}); save it "
            "as numbers."
        ) from None
