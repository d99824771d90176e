"""Where voxels lie in the world: affines, bringing a mask onto its image's grid, canonical slicing.

SimpleITK works in LPS; affines here are RAS+ and map (x, y, z) array indices to mm, as in nibabel.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medsam2.cases.case import CaseError

if TYPE_CHECKING:
    import SimpleITK as sitk

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
RELATIVE_ROUNDING = 1e-3


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


def geometry_of(image: sitk.Image) -> Geometry:
    """The grid of a 3-D SimpleITK image."""
    affine = affine_from_itk(np.array(image.GetSpacing()), np.array(image.GetDirection()), np.array(image.GetOrigin()))
    x, y, z = image.GetSize()
    return Geometry(affine, (x, y, z))


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


def align_mask(
    mask: sitk.Image, image: sitk.Image, mask_path: Path, image_path: Path, located: bool
) -> tuple[sitk.Image, str | None]:
    """`mask` on the grid of `image`, nearest neighbour, and a report where it had to be resampled.

    Args:
        located: whether both files say where their voxels lie; without that only equal shapes are accepted.

    Raises:
        CaseError: shapes differ and no affine says how, or the two do not overlap in the world.
    """
    import SimpleITK as sitk

    grid, target = geometry_of(mask), geometry_of(image)
    if same_grid(grid, target):
        return mask, None
    if not located:
        if grid.shape == target.shape:
            return mask, f"{mask_path.name}: image or mask has no affine; taken to lie on the same grid."
        raise CaseError(
            f"{mask_path}: mask of shape {grid.shape} for an image of shape {target.shape} ({image_path}), and no "
            "affine in the files says how they lie; save the mask on the image's grid, or with its affine."
        )
    if not overlap(grid, target):
        raise CaseError(
            f"{mask_path}: the mask does not overlap its image in the world: mask {describe(grid)}; "
            f"image {image_path}: {describe(target)}. Check that they belong together and mend the affine of one."
        )
    moved = sitk.Resample(mask, image, sitk.Transform(3, sitk.sitkIdentity), sitk.sitkNearestNeighbor, 0)
    before = sitk.GetArrayViewFromImage(mask)
    if before.any() and not sitk.GetArrayViewFromImage(moved).any():
        raise CaseError(
            f"{mask_path}: no labelled voxel falls inside the image {image_path}: mask {describe(grid)}; "
            f"image {describe(target)}. Check that they belong together."
        )
    return moved, (
        f"{mask_path.name}: mask resampled onto the grid of its image "
        f"(mask {describe(grid)}; image {describe(target)})."
    )


def slicing_code(image: sitk.Image) -> str:
    """The SimpleITK orientation (letters for x, y, z) that puts the coarsest axis last and stands patients upright.

    Axial slices show anterior up and the patient's right at the left; sagittal and coronal ones show the head up.
    Axes within 1 % of the coarsest spacing count as equal, and axial wins.
    """
    import SimpleITK as sitk

    code = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection())
    spacing = image.GetSpacing()
    by_axis: dict[str, float] = {}
    for letter, size in zip(code, spacing, strict=True):
        by_axis["x" if letter in "LR" else "y" if letter in "AP" else "z"] = size
    coarsest = max(by_axis.values())
    axis = next(a for a in "zyx" if by_axis[a] >= 0.99 * coarsest)
    return {"z": "LPS", "y": "LIP", "x": "PIL"}[axis]


def canonical(image: sitk.Image, code: str) -> sitk.Image:
    """`image` with axes permuted and flipped to `code`; no voxel is interpolated and the affine follows."""
    import SimpleITK as sitk

    if sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection()) == code:
        return image
    return sitk.DICOMOrient(image, code)
