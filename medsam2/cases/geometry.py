"""Where voxels lie in the world: affines, bringing a mask onto its image's grid, canonical slicing.

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
UPRIGHT = {"z": "SPL", "y": "PIL", "x": "LIP"}
"""Directions of T, H and W by slicing axis: axial slices show anterior up and the patient's right at the left;
coronal and sagittal ones show the head up."""
LETTERS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


class CaseWarning(UserWarning):
    """Something about a case that was mended and that its owner should know."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """The grid of a volume: affine (RAS+, index x, y, z -> mm) and shape (x, y, z)."""

    affine: np.ndarray
    shape: tuple[int, int, int]

    def corners(self) -> np.ndarray:
        """World position [8, 3] in mm of the outermost voxel centres."""
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
    """The affine of a grid of which only the spacing (z, y, x) is known: an axial stack, feet first."""
    z, y, x = spacing
    return np.diag([-x, -y, z, 1.0])


def same_grid(a: Geometry, b: Geometry) -> bool:
    """Whether two grids are equal up to rounding: no corner moves by more than 1e-3 of the extent or half a voxel."""
    if a.shape != b.shape:
        return False
    moved = np.linalg.norm(a.corners() - b.corners(), axis=1).max()
    extent = float(np.linalg.norm(np.array(a.shape) * a.spacing))
    return bool(moved <= min(RELATIVE_ROUNDING * extent, 0.5 * float(a.spacing.min())))


def overlap(a: Geometry, b: Geometry) -> bool:
    """Whether the axis-aligned world boxes of two grids (half a voxel around the centres) meet."""
    half = max(float(a.spacing.max()), float(b.spacing.max())) / 2
    low = np.maximum(a.corners().min(0), b.corners().min(0)) - half
    high = np.minimum(a.corners().max(0), b.corners().max(0)) + half
    return bool((low < high).all())


def describe(grid: Geometry) -> str:
    """Shape, spacing and world extent in one line, for messages."""
    low, high = grid.corners().min(0), grid.corners().max(0)
    box = ", ".join(f"{a:.1f}..{b:.1f}" for a, b in zip(low, high, strict=True))
    return f"shape {grid.shape}, spacing {tuple(float(round(s, 4)) for s in grid.spacing)} mm, from/to ({box}) mm"


def align_mask(mask: MaskRaster, image: Raster, alone: bool = True) -> tuple[np.ndarray, str | None]:
    """The planes [P, Z, Y, X] of `mask` on the grid of `image`, nearest neighbour, and a report where they moved.

    Args:
        alone: whether the case has no other mask; one structure of many may lie outside of a cropped image.

    Raises:
        CaseError: shapes differ and no affine says how, or the two do not overlap in the world.
    """
    shape, target = mask.planes.shape[1:], image.array.shape[:3]
    if mask.affine is None or image.affine is None:
        if shape != target:
            raise CaseError(
                f"{mask.path}: mask of shape {shape} for an image of shape {target} ({image.path}), and no affine in "
                "the files says how they lie; save the mask on the image's grid, or with its affine."
            )
        one_sided = (mask.affine is None) != (image.affine is None)
        report = f"{mask.path.name}: image or mask has no affine; taken to lie on the same grid."
        return mask.planes, report if one_sided else None
    grid, goal = Geometry(mask.affine, _xyz(shape)), Geometry(image.affine, _xyz(target))
    if same_grid(grid, goal):
        return mask.planes, None
    if not overlap(grid, goal):
        raise CaseError(
            f"{mask.path}: the mask does not overlap its image in the world: mask {describe(grid)}; "
            f"image {image.path}: {describe(goal)}. Check that they belong together and mend the affine of one."
        )
    moved = resample(mask.planes, grid, goal)
    if alone and mask.planes.any() and not moved.any():
        raise CaseError(
            f"{mask.path}: no labelled voxel falls inside the image {image.path}: mask {describe(grid)}; "
            f"image {describe(goal)}. Check that they belong together."
        )
    return moved, (
        f"{mask.path.name}: mask resampled onto the grid of its image (mask {describe(grid)}; image {describe(goal)})."
    )


def resample(planes: np.ndarray, grid: Geometry, goal: Geometry) -> np.ndarray:
    """Planes [P, Z, Y, X] of `grid` at the voxel centres of `goal`, nearest neighbour, 0 outside."""
    from scipy.ndimage import affine_transform

    if abs(np.linalg.det(grid.affine[:3, :3] / grid.spacing)) < 1e-6:
        raise CaseError("the affine of an image or mask has an axis of length zero; mend its header.")
    matrix = (np.linalg.inv(grid.affine) @ goal.affine)[:3]
    turned, offset = matrix[::-1, 2::-1], matrix[::-1, 3] + 1e-6  # z, y, x; exactly between two voxels: the upper one
    out = np.zeros((planes.shape[0], *goal.shape[::-1]), planes.dtype)
    for plane, target in zip(planes, out, strict=True):
        affine_transform(plane, turned, offset, output=target, order=0, mode="grid-constant")
    return out


def orientation_of(affine: np.ndarray, axis: str = "auto") -> Orientation:
    """How to turn an array [Z, Y, X] with this affine so that T runs along `axis` and patients stand upright.

    Args:
        axis: x, y or z of the patient, or "auto": the coarsest spacing. Axes within 1 % of it count as equal, and
            axial wins.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    cosines = affine[:3, :3] / spacing
    # which column of the affine is closest to R, A and S: six ways to choose, so no solver is needed
    of_world = max(itertools.permutations(range(3)), key=lambda columns: np.abs(cosines[(0, 1, 2), columns]).sum())
    if axis == "auto":
        size = {name: spacing[of_world[w]] for w, name in enumerate("xyz")}
        coarsest = max(size.values())
        axis = next(name for name in "zyx" if size[name] >= 0.99 * coarsest)
    axes, flips = [], []
    for letter in UPRIGHT[axis]:
        direction, sign = LETTERS[letter]
        used = of_world[direction]
        axes.append(2 - used)
        flips.append(bool(cosines[direction, used] * sign < 0))
    return Orientation((axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2]))


def reorient_affine(affine: np.ndarray, shape: tuple[int, int, int], orientation: Orientation) -> np.ndarray:
    """The affine of the turned array; `shape` [Z, Y, X] is the source's."""
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
    """The affine of the source's own array; `affine` and `shape` [T, H, W] are the turned array's."""
    return reorient_affine(affine, shape, orientation.inverse)


def to_source(
    mask: np.ndarray, orientation: Orientation, affine: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Mask [T, H, W] as [Z, Y, X] of the source, with the source's own RAS+ affine; no voxel is interpolated."""
    shape = (mask.shape[0], mask.shape[1], mask.shape[2])
    source = orientation.undo(mask)
    return source, None if affine is None else source_affine(affine, shape, orientation)


def _xyz(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return shape[2], shape[1], shape[0]
