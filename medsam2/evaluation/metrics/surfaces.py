"""Distances between the surfaces of two masks: surface Dice (NSD), HD95 and ASSD from one pass.

Surfaces run between pixel centres. Each mixed 2 x 2 (x 2) neighbourhood holds one surface element at its centre,
weighted by the area (length in 2D) of the surface inside it, as in DeepMind's surface-distance (Nikolov et al., arXiv
1809.04430) and in MONAI with `use_subvoxels=True`. Many tools count border voxels instead, which weights oblique and
coarse surfaces wrongly and gives different numbers. The array is padded with background, so an object that is cut by
its border has a surface there.

    NSD   share of both surfaces' area whose distance to the other one is at most the tolerance
    HD95  the larger of the two directed 95th percentiles by area (DeepMind's robust Hausdorff distance)
    ASSD  mean over both surfaces' area together of the distance to the other one

If both masks are empty, NSD is 1 and the distances are 0. If one is empty, NSD is 0 and the distances are the diagonal
of the image, the largest possible value (as in BraTS, Bakas et al., arXiv 1811.02629): skipping such objects would
reward missing them.

Legend: T slices or frames, H and W pixels, E surface elements.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

PERCENTILE = 0.95
ROUNDING_SLACK = 1e-9  # so that a distance equal to the tolerance is within it: 3 x 0.7 is not 2.1 in floating point


@dataclass(frozen=True)
class SurfaceScores:
    """Surface scores of two masks. nsd: 0 to 1. hd95, assd: in the unit of the spacing."""

    nsd: float
    hd95: float
    assd: float


def surface_scores(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: tuple[float, ...],
    tolerance: float,
    volume: bool,
    shape: tuple[int, ...] | None = None,
) -> SurfaceScores:
    """Scores of a volume in 3D, or of a clip: the mean over the frames where either mask is not empty.

    Args:
        prediction, truth: bool [T, H, W].
        spacing: (z, y, x); the first entry is used for volumes only.
        tolerance: in the unit of `spacing`.
        shape: (T, H, W) of the whole image if the masks are cropped.
    """
    shape = shape or truth.shape
    if volume:
        return distances(prediction, truth, spacing, tolerance, shape)
    frames = np.flatnonzero((prediction | truth).any((1, 2)))
    scores = [astuple(distances(prediction[t], truth[t], spacing[1:], tolerance, shape[1:])) for t in frames]
    columns = zip(*scores, strict=True)
    return SurfaceScores(*(float(np.mean(column)) for column in columns)) if scores else SurfaceScores(1.0, 0.0, 0.0)


def distances(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: tuple[float, ...],
    tolerance: float,
    shape: tuple[int, ...] | None = None,
) -> SurfaceScores:
    """Scores of two bool arrays [H, W] or [T, H, W]; `spacing` and `tolerance` share a unit.

    Args:
        shape: of the whole image if the masks are cropped.
    """
    if not prediction.any() or not truth.any():
        if prediction.any() == truth.any():
            return SurfaceScores(1.0, 0.0, 0.0)
        farthest = math.hypot(*(step * (size - 1) for step, size in zip(spacing, shape or truth.shape, strict=True)))
        return SurfaceScores(0.0, farthest, farthest)
    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[0]
    areas = _areas(tuple(float(step) for step in spacing))
    (predicted, predicted_areas), (true, true_areas) = (
        _surface(np.pad(mask[box], 1), areas) for mask in (prediction, truth)
    )
    to_truth, to_prediction = _nearest(predicted, true, spacing), _nearest(true, predicted, spacing)
    far, weight = np.concatenate([to_truth, to_prediction]), np.concatenate([predicted_areas, true_areas])
    return SurfaceScores(
        nsd=float(weight[far <= tolerance + ROUNDING_SLACK].sum() / weight.sum()),
        hd95=max(_percentile(to_truth, predicted_areas), _percentile(to_prediction, true_areas)),
        assd=float((far * weight).sum() / weight.sum()),
    )


def _surface(mask: np.ndarray, areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Surface elements of a bool array: a bool grid of the mixed 2 x 2 (x 2) neighbourhoods, and their areas [E]."""
    code: np.ndarray = mask.astype(np.uint8)
    for bits, axis in zip((1, 2, 4), reversed(range(mask.ndim)), strict=False):  # bit order of MONAI's tables
        before, after = np.moveaxis(code, axis, 0)[:-1], np.moveaxis(code, axis, 0)[1:]
        code = np.moveaxis((before << bits) | after, 0, axis)
    edge = (code != 0) & (code != len(areas) - 1)
    return edge, areas[code[edge]]


@lru_cache(maxsize=64)
def _areas(spacing: tuple[float, ...]) -> np.ndarray:
    """MONAI's table of surface area (length in 2D) for each of the 256 (16) neighbourhoods."""
    from monai.metrics.utils import get_code_to_measure_table

    return get_code_to_measure_table(spacing)[0].double().numpy()


def _nearest(surface: np.ndarray, other: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Distance of each element of `surface` (bool grid) to the nearest element of `other`: [E].

    A k-d tree costs as much as the surface is large; a distance map would cost as much as the box, which is slow for a
    thin vessel across the whole scan. Elements of both surfaces have distance 0 and are not searched.
    """
    separate = ~other[surface]
    nearest = np.zeros(len(separate))
    if separate.any():
        tree = KDTree(np.argwhere(other) * spacing, balanced_tree=False, compact_nodes=False)
        nearest[separate] = tree.query(np.argwhere(surface)[separate] * spacing)[0]
    return nearest


def _percentile(far: np.ndarray, weight: np.ndarray) -> float:
    """The smallest distance that covers 95 % of the surface's area."""
    order = np.argsort(far)
    share = np.cumsum(weight[order]) / weight.sum()
    return float(far[order[min(int(np.searchsorted(share, PERCENTILE - ROUNDING_SLACK)), len(far) - 1)]])
