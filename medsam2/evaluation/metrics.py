"""Overlap and surface scores of one object, on its native grid, over the whole volume or clip.

What is undefined is defined here, for every score: both masks empty is 1, one of them empty is 0. Empty slices
count, so a false positive on a slice without the object costs.

Legend: T slices or frames, H and W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage


@dataclass(frozen=True)
class Scores:
    """The scores of one object.

    Attributes:
        dsc, iou: over all voxels together.
        nsd: surface Dice at a tolerance (Nikolov et al., arXiv 1809.04430): in 3D with spacing for volumes, frame by
            frame for clips and stills (the mean over frames where either mask shows something).
        prompt_dsc: over the prompted frames together. other_dsc: over the rest; NaN where there is no rest.
        absent_empty_share: of the frames without the object, the share predicted empty; NaN if it is on all frames.
        absent_all_empty: whether that share is 1; None if it is on all frames.
    """

    dsc: float
    iou: float
    nsd: float
    prompt_dsc: float
    other_dsc: float
    absent_empty_share: float
    absent_all_empty: bool | None


def score(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: tuple[float, float, float],
    tolerance: float,
    volume: bool,
    prompted: tuple[int, ...] = (),
) -> Scores:
    """All scores of one object.

    Args:
        prediction, truth: bool [T, H, W].
        spacing: (z, y, x); its first entry is not used unless `volume`.
        tolerance: of the surface Dice, in the unit of `spacing`; NaN leaves it out.
        volume: slices in space (surfaces in 3D), not frames in time (contours in 2D).
        prompted: the frames that carried a prompt.
    """
    overlap = (prediction & truth).sum((1, 2), dtype=np.int64)
    sizes = prediction.sum((1, 2), dtype=np.int64), truth.sum((1, 2), dtype=np.int64)
    chosen = np.isin(np.arange(len(truth)), prompted)
    absent = sizes[1] == 0
    if math.isnan(tolerance):
        nsd = math.nan
    elif volume:
        nsd = surface_dice(prediction, truth, spacing, tolerance)
    else:
        nsd = _mean_over_frames(prediction, truth, spacing[1:], tolerance)
    return Scores(
        dsc=_dice(overlap, *sizes),
        iou=_iou(overlap, *sizes),
        nsd=nsd,
        prompt_dsc=_dice(overlap[chosen], sizes[0][chosen], sizes[1][chosen]) if chosen.any() else math.nan,
        other_dsc=_dice(overlap[~chosen], sizes[0][~chosen], sizes[1][~chosen]) if not chosen.all() else math.nan,
        absent_empty_share=float((sizes[0][absent] == 0).mean()) if absent.any() else math.nan,
        absent_all_empty=bool((sizes[0][absent] == 0).all()) if absent.any() else None,
    )


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of two bool arrays of equal shape; 1 if both are empty."""
    return _dice(*(np.asarray(x.sum(dtype=np.int64)) for x in (prediction & truth, prediction, truth)))


def iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    """|A and B| / |A or B| of two bool arrays of equal shape; 1 if both are empty."""
    return _iou(*(np.asarray(x.sum(dtype=np.int64)) for x in (prediction & truth, prediction, truth)))


def _dice(overlap: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    total = int(first.sum() + second.sum())
    return 2.0 * int(overlap.sum()) / total if total else 1.0


def _iou(overlap: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    union = int(first.sum() + second.sum() - overlap.sum())
    return int(overlap.sum()) / union if union else 1.0


def _mean_over_frames(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> float:
    shown = np.flatnonzero((prediction | truth).any((1, 2)))
    values = [surface_dice(prediction[t], truth[t], spacing, tolerance) for t in shown]
    return float(np.mean(values)) if values else 1.0


def surface_dice(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> float:
    """Surface Dice (NSD) of two bool arrays [H, W] or [T, H, W]; `spacing` and `tolerance` in one unit.

    Surfaces run between pixel centres and are weighted by their area (length in 2D), as in DeepMind's
    surface-distance and MONAI's `compute_surface_dice(use_subvoxels=True)`, whose values it gives; both compute on
    the whole array, this on the bounding box of the union. The border of the array is outside.
    """
    if not prediction.any() or not truth.any():
        return float(prediction.any() == truth.any())
    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[0]
    areas = _areas(tuple(float(s) for s in spacing))
    surfaces = [_surface(np.pad(mask[box], 1), areas) for mask in (prediction, truth)]
    total = near = 0.0
    for (edge, area), (other, _) in (surfaces, surfaces[::-1]):
        distance = ndimage.distance_transform_edt(~other, sampling=spacing)[edge]
        total += area.sum()
        near += area[distance <= tolerance].sum()
    return float(near / total)


def _surface(mask: np.ndarray, areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Surface elements of a bool array: where the 2 x 2 (x 2) neighbourhoods are mixed, and the area of each."""
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
