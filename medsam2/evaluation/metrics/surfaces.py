"""Distances between the surfaces of two masks: surface Dice (NSD), HD95 and ASSD from one pass.

Surfaces run between pixel centres: wherever a 2 x 2 (x 2) neighbourhood is mixed there is one surface element, placed
at the neighbourhood's centre and weighted by the area (length in 2D) of the surface inside it, as in DeepMind's
surface-distance (Nikolov et al., arXiv 1809.04430) and in MONAI with `use_subvoxels=True`. Counting border voxels
instead, as many tools do, gives another number: it weights oblique and coarse surfaces wrongly. The border of the
array is outside, so an object that is cut by it has a surface there.

    NSD   share of both surfaces' area whose distance to the other one is at most the tolerance
    HD95  the larger of the two directed 95th percentiles by area (DeepMind's robust Hausdorff distance)
    ASSD  mean over both surfaces' area together of the distance to the other one

Both empty: NSD 1, distances 0. One empty: NSD 0, and as distance the diagonal of the image, the largest that there
can be (as BraTS does, Bakas et al., arXiv 1811.02629): leaving such objects out would reward missing them.

Legend: T slices or frames, H and W pixels, E surface elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

PERCENTILE = 0.95
SLACK = 1e-9  # 3 x 0.7 is not 2.1 in floating point: a distance equal to the tolerance is within it


@dataclass(frozen=True)
class SurfaceScores:
    """nsd: 0 to 1. hd95, assd: in the unit of the spacing."""

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
    """Scores of a volume in 3D, or of a clip: the mean over the frames where either mask shows something.

    Args:
        prediction, truth: bool [T, H, W].
        spacing: (z, y, x); the first entry is used for volumes only.
        tolerance: in the unit of `spacing`.
        shape: of the whole image (T, H, W) where the masks are a part of it.
    """
    shape = shape or truth.shape
    if volume:
        return distances(prediction, truth, spacing, tolerance, shape)
    shown = np.flatnonzero((prediction | truth).any((1, 2)))
    found = [distances(prediction[t], truth[t], spacing[1:], tolerance, shape[1:]) for t in shown]
    if not found:
        return SurfaceScores(1.0, 0.0, 0.0)
    return SurfaceScores(*(float(np.mean([getattr(one, name) for one in found])) for name in ("nsd", "hd95", "assd")))


def distances(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: tuple[float, ...],
    tolerance: float,
    shape: tuple[int, ...] | None = None,
) -> SurfaceScores:
    """Scores of two bool arrays [H, W] or [T, H, W]; `spacing` and `tolerance` in one unit, `shape` as above."""
    if not prediction.any() or not truth.any():
        if prediction.any() == truth.any():
            return SurfaceScores(1.0, 0.0, 0.0)
        farthest = math.hypot(*(step * (size - 1) for step, size in zip(spacing, shape or truth.shape, strict=True)))
        return SurfaceScores(0.0, farthest, farthest)
    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[0]
    areas = _areas(tuple(float(step) for step in spacing))
    (ours, our_areas), (theirs, their_areas) = (_surface(np.pad(mask[box], 1), areas) for mask in (prediction, truth))
    to_truth, to_prediction = _nearest(ours, theirs, spacing), _nearest(theirs, ours, spacing)
    far, weight = np.concatenate([to_truth, to_prediction]), np.concatenate([our_areas, their_areas])
    return SurfaceScores(
        nsd=float(weight[far <= tolerance + SLACK].sum() / weight.sum()),
        hd95=max(_percentile(to_truth, our_areas), _percentile(to_prediction, their_areas)),
        assd=float((far * weight).sum() / weight.sum()),
    )


def _surface(mask: np.ndarray, areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Surface elements of a bool array: where the 2 x 2 (x 2) neighbourhoods are mixed, and the area of each [E]."""
    code: np.ndarray = mask.astype(np.uint8)
    for bits, axis in zip((1, 2, 4), reversed(range(mask.ndim)), strict=False):  # the published tables' order of bits
        before, after = np.moveaxis(code, axis, 0)[:-1], np.moveaxis(code, axis, 0)[1:]
        code = np.moveaxis((before << bits) | after, 0, axis)
    edge = (code != 0) & (code != len(areas) - 1)
    return edge, areas[code[edge]]


@lru_cache(maxsize=64)
def _areas(spacing: tuple[float, ...]) -> np.ndarray:
    """Area (length in 2D) of the surface in each of the 256 (16) neighbourhoods: MONAI's tables."""
    from monai.metrics.utils import get_code_to_measure_table

    return get_code_to_measure_table(spacing)[0].double().numpy()


def _nearest(own: np.ndarray, other: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Distance of each of our surface elements (bool grid) to the nearest of the other surface: [E].

    A tree over the elements, not a distance map over the box: its cost is that of the surface, so that a thin vessel
    across the whole scan stays cheap. Where both surfaces run, the distance is 0 and nothing is searched.
    """
    apart = ~other[own]
    found = np.zeros(len(apart))
    if apart.any():
        tree = KDTree(np.argwhere(other) * spacing, balanced_tree=False, compact_nodes=False)
        found[apart] = tree.query(np.argwhere(own)[apart] * spacing)[0]
    return found


def _percentile(far: np.ndarray, weight: np.ndarray) -> float:
    """The smallest distance within which 95 % of the surface's area lie."""
    order = np.argsort(far)
    share = np.cumsum(weight[order]) / weight.sum()
    return float(far[order[min(int(np.searchsorted(share, PERCENTILE - SLACK)), len(far) - 1)]])
