"""World geometry of voxels: affines, resampling of masks onto the image's grid, canonical slicing.

Affines are RAS+ and map array indices (x, y, z) to mm, as in nibabel; ITK and DICOM work in LPS. Arrays are [Z, Y, X].
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from medsam2.cases.case import CaseError, Orientation
from medsam2.cases.raster import MaskRaster, Raster

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
RELATIVE_ROUNDING = 1e-3
UPRIGHT_DIRECTIONS = {"z": "SPL", "y": "PIL", "x": "LIP"}
"""Directions of T, H and W by slicing axis. Axial slices show anterior up and the patient's right on the left; coronal
and sagittal slices show the head up."""
WORLD_DIRECTIONS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


class CaseWarning(UserWarning):
    """Something in a case was repaired, and its owner should know."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """The grid of a volume: affine (RAS+, index x, y, z to mm) and shape (x, y, z)."""

    affine: np.ndarray
    shape: tuple[int, int, int]

    def corners(self) -> np.ndarray:
        """World positions [8, 3] in mm of the outermost voxel centres."""
        ends = [(0.0, float(n - 1)) for n in self.shape]
        index = np.array([(*corner, 1.0) for corner in itertools.product(*ends)])
        return np.asarray((index @ self.affine.T)[:, :3])

    @property
    def spacing(self) -> np.ndarray:
        """(x, y, z) in mm."""
        return np.asarray(np.linalg.norm(self.affine[:3, :3], axis=0))


def affine_from_itk(spacing: np.ndarray, direction: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """RAS+ affine [4, 4] from ITK's LPS spacing (x, y, z), direction (9, row-major) and origin."""
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(direction, float).reshape(3, 3) * np.asarray(spacing, float)[None, :]
    affine[:3, 3] = origin
    return np.asarray(LPS_TO_RAS @ affine)


def itk_from_affine(affine: np.ndarray) -> tuple[list[float], list[float], list[float]]:
    """ITK's spacing (x, y, z), direction (9, row-major) and origin, LPS, of a RAS+ affine [4, 4]."""
    lps = LPS_TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    return spacing.tolist(), (lps[:3, :3] / spacing).ravel().tolist(), lps[:3, 3].tolist()


def default_affine(spacing: tuple[float, float, float]) -> np.ndarray:
    """Return the affine of an axial stack, feet first, for a grid with known spacing (z, y, x) and nothing else."""
    z, y, x = spacing
    return np.diag([-x, -y, z, 1.0])


def same_grid(a: Geometry, b: Geometry) -> bool:
    """Whether two grids are equal up to rounding: corners differ by at most 1e-3 of the extent and half a voxel."""
    if a.shape != b.shape:
        return False
    distance = np.linalg.norm(a.corners() - b.corners(), axis=1).max()
    extent = float(np.linalg.norm(np.array(a.shape) * a.spacing))
    return bool(distance <= min(RELATIVE_ROUNDING * extent, 0.5 * float(a.spacing.min())))


def overlap(a: Geometry, b: Geometry) -> bool:
    """Whether the axis-aligned world boxes of two grids intersect; boxes extend half a voxel beyond the centres."""
    half = max(float(a.spacing.max()), float(b.spacing.max())) / 2
    low = np.maximum(a.corners().min(0), b.corners().min(0)) - half
    high = np.minimum(a.corners().max(0), b.corners().max(0)) + half
    return bool((low < high).all())


def describe(grid: Geometry) -> str:
    """Describe shape, spacing and world extent in one line, for messages."""
    low, high = grid.corners().min(0), grid.corners().max(0)
    box = ", ".join(f"{a:.1f}..{b:.1f}" for a, b in zip(low, high, strict=True))
    return f"shape {grid.shape}, spacing {tuple(float(round(s, 4)) for s in grid.spacing)} mm, from/to ({box}) mm"


def align_mask(mask: MaskRaster, image: Raster, only_mask: bool = True) -> tuple[np.ndarray, str | None]:
    """Resample the planes [P, Z, Y, X] of `mask` to the grid of `image`, with nearest neighbour.

    Args:
        only_mask: whether the case has no other mask. One of several structures may lie outside a cropped image.

    Returns:
        The planes, and a sentence for the user if the mask was resampled or one affine is missing, else None.

    Raises:
        CaseError: shapes differ and an affine is missing, or mask and image do not overlap in the world.
    """
    shape, target_shape = mask.planes.shape[1:], image.array.shape[:3]
    if mask.affine is None or image.affine is None:
        if shape != target_shape:
            raise CaseError(
                f"{mask.path}: mask of shape {shape} for an image of shape {target_shape} ({image.path}), and no "
                "affine in the files relates them; save the mask on the image's grid, or with its affine."
            )
        one_sided = (mask.affine is None) != (image.affine is None)
        report = f"{mask.path.name}: image or mask has no affine; both are assumed to lie on the same grid."
        return mask.planes, report if one_sided else None
    grid, target_grid = Geometry(mask.affine, _xyz(shape)), Geometry(image.affine, _xyz(target_shape))
    if same_grid(grid, target_grid):
        return mask.planes, None
    if not overlap(grid, target_grid):
        raise CaseError(
            f"{mask.path}: the mask does not overlap its image in the world: mask {describe(grid)}; "
            f"image {image.path}: {describe(target_grid)}. Check that they belong together, and correct one affine."
        )
    resampled = resample(mask.planes, grid, target_grid)
    if only_mask and mask.planes.any() and not resampled.any():
        raise CaseError(
            f"{mask.path}: no labelled voxel falls inside the image {image.path}: mask {describe(grid)}; "
            f"image {describe(target_grid)}. Check that they belong together."
        )
    return resampled, (
        f"{mask.path.name}: mask resampled to the image's grid (mask {describe(grid)}; image {describe(target_grid)})."
    )


def resample(planes: np.ndarray, grid: Geometry, target_grid: Geometry) -> np.ndarray:
    """Sample planes [P, Z, Y, X] of `grid` at the voxel centres of `target_grid`: nearest neighbour, 0 outside."""
    from scipy.ndimage import affine_transform

    if abs(np.linalg.det(grid.affine[:3, :3] / grid.spacing)) < 1e-6:
        raise CaseError("the affine of an image or mask has an axis of length zero; correct its header.")
    matrix = (np.linalg.inv(grid.affine) @ target_grid.affine)[:3]
    linear, offset = matrix[::-1, 2::-1], matrix[::-1, 3] + 1e-6  # z, y, x; ties go to the upper voxel
    out = np.zeros((planes.shape[0], *target_grid.shape[::-1]), planes.dtype)
    for plane, target in zip(planes, out, strict=True):
        affine_transform(plane, linear, offset, output=target, order=0, mode="grid-constant")
    return out


def orientation_of(affine: np.ndarray, axis: str = "auto") -> Orientation:
    """Return the orientation that makes an array [Z, Y, X] with this affine upright, with T along `axis`.

    Args:
        axis: x, y or z of the patient, or "auto" for the axis of coarsest spacing. Spacings within 1 % count as
            equal, and axial takes precedence.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    cosines = affine[:3, :3] / spacing
    # assign the columns of the affine to R, A and S; with six permutations, no solver is needed
    column_of = max(itertools.permutations(range(3)), key=lambda columns: np.abs(cosines[(0, 1, 2), columns]).sum())
    if axis == "auto":
        size = {name: spacing[column_of[w]] for w, name in enumerate("xyz")}
        coarsest = max(size.values())
        axis = next(name for name in "zyx" if size[name] >= 0.99 * coarsest)
    axes, flips = [], []
    for letter in UPRIGHT_DIRECTIONS[axis]:
        direction, sign = WORLD_DIRECTIONS[letter]
        column = column_of[direction]
        axes.append(2 - column)
        flips.append(bool(cosines[direction, column] * sign < 0))
    return Orientation((axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2]))


def reorient_affine(affine: np.ndarray, shape: tuple[int, int, int], orientation: Orientation) -> np.ndarray:
    """Return the affine of the reoriented array; `shape` [Z, Y, X] is that of the source."""
    result = np.eye(4)
    result[:3, 3] = affine[:3, 3]
    for k, (axis, flip) in enumerate(zip(orientation.axes, orientation.flips, strict=True)):
        column = affine[:3, 2 - axis]
        if flip:
            result[:3, 3] += column * (shape[axis] - 1)
            column = -column
        result[:3, 2 - k] = column
    return result


def source_affine(affine: np.ndarray, shape: tuple[int, int, int], orientation: Orientation) -> np.ndarray:
    """Return the affine of the source's array; `affine` and `shape` [T, H, W] belong to the reoriented array."""
    return reorient_affine(affine, shape, orientation.inverse)


def to_source(
    mask: np.ndarray, orientation: Orientation, affine: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Reorient a mask [T, H, W] to [Z, Y, X] of the source, and return it with the source's RAS+ affine."""
    shape = (mask.shape[0], mask.shape[1], mask.shape[2])
    source = orientation.undo(mask)
    return source, None if affine is None else source_affine(affine, shape, orientation)


def _xyz(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return shape[2], shape[1], shape[0]
