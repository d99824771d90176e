"""Native intensities -> uint8, by modality or by the window a user asks for.

CT: a window of Hounsfield units whose *bounds* map to 0 and 255. MR, PET and other unscaled scans: the 0.5-99.5
percentiles of the voxels above zero, zeros stay zero. RGB and uint8 pictures are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medsam2.cases.case import Case, CaseError
from medsam2.cases.settings import WINDOW_PRESETS, Window
from medsam2.cases.values import value_counts

PERCENTILES: Window = (0.5, 99.5)
PROBABILITIES = np.linspace(0, 1, 1001)
"""Where `Quantiles` are taken: the 0.5 percentile of a pool of cases is then known to 0.1 percent of its voxels."""


def to_uint8(
    case: Case, window: str | Window | None = None, percentiles: tuple[float, float] = PERCENTILES
) -> tuple[np.ndarray, str]:
    """uint8 image of the case's shape, and what was done, e.g. "-160:240 HU".

    uint8 and boolean images and RGB are scaled already: they stay as stored whatever the modality and the window.

    Args:
        window: (low, high) that map to 0 and 255; "dicom", the window that the source carries; "percentiles"; a preset,
            which is in HU and so holds for CT alone (other scans get their default); None is the default of the
            modality: abdomen for CT, else percentiles.
        percentiles: those of the voxels above zero that map to 0 and 255.

    Raises:
        CaseError: an empty image, RGB that is not uint8, no voxel above zero to take percentiles of, or no window in
            the source.
    """
    image = case.image
    if not any(part.any() for part in image):  # nearly always the first slice says so
        raise CaseError(f"{case.where}: the image is empty: every voxel is 0. Check the file, or leave the case out.")
    if image.dtype == np.uint8:
        return image, "as stored"
    if image.dtype == np.bool_:
        return image.astype(np.uint8) * np.uint8(255), "as stored"
    if image.ndim == 4:
        raise CaseError(
            f"{case.where}: RGB of type {image.dtype}; only uint8 is read. Convert it to 8 bits a channel first."
        )
    bounds = _bounds(case, window)
    if bounds is None:
        low, high = percentiles_above_zero(image, case.where, percentiles)
        text = f"{low:g}:{high:g} (percentiles {percentiles[0]:g}-{percentiles[1]:g} above zero)"
    else:
        low, high = bounds
        unit = " HU" if case.modality == "CT" else ""
        text = f"{low:g}:{high:g}{unit}{' (dicom)' if window == 'dicom' else ''}"
    return _ramp(image, low, high), text


def _bounds(case: Case, window: str | Window | None) -> Window | None:
    """The window in numbers; None where percentiles of the case decide."""
    if window == "dataset-percentiles":
        raise CaseError(f"{case.where}: window {window!r}: they must be counted over all cases first; give LO:HI.")
    if window == "dicom":
        if case.window is None:
            raise CaseError(
                f"{case.where}: window 'dicom': the source carries no window (tags WindowCenter and WindowWidth). "
                "Give window LO:HI, a preset or percentiles for this data set."
            )
        window = case.window
    elif window == "percentiles" or (window in (None, *WINDOW_PRESETS) and case.modality != "CT"):
        return None
    return window if isinstance(window, tuple) else WINDOW_PRESETS[window or "abdomen"]


def percentiles_above_zero(image: np.ndarray, where: str, percentiles: tuple[float, float] = PERCENTILES) -> Window:
    """Two percentiles of the voxels above zero, as `numpy.percentile` gives them.

    Where both are one value (a picture of two values), zero and that value, so that the picture is not black.

    Raises:
        CaseError: no voxel is above zero.
    """
    total, (low, high) = _quantiles_above_zero(image, np.asarray(percentiles, np.float64) / 100)
    if not total:
        raise CaseError(f"{where}: no voxel above zero; the image is empty or needs a --window.")
    return _distinct(float(low), float(high))


def _distinct(low: float, high: float) -> Window:
    return (low, high) if high > low else (0.0, high)


@dataclass(frozen=True)
class Quantiles:
    """How the voxels above zero of a case are spread; small enough to keep for every case of a data set.

    Attributes:
        count: of the voxels above zero. values: their quantiles at `PROBABILITIES`; none where there is no such voxel.
    """

    count: int
    values: tuple[float, ...]


def case_quantiles(case: Case) -> Quantiles:
    """Quantiles of the voxels above zero."""
    total, values = _quantiles_above_zero(case.image, PROBABILITIES)
    return Quantiles(total, tuple(values.tolist()) if total else ())


def merge_quantiles(parts: Sequence[Quantiles], percentiles: tuple[float, float] = PERCENTILES) -> Window:
    """Two percentiles of the voxels above zero of all cases, in whatever order the cases come.

    The rank of the result is off by at most 0.1 percent: between two quantiles of a case its voxels are taken as
    evenly spread.

    Raises:
        CaseError: no case has a voxel above zero.
    """
    filled = sorted((part for part in parts if part.count), key=lambda part: (part.count, part.values))
    if not filled:
        raise CaseError(
            f"dataset-percentiles: none of {len(parts)} cases has a voxel above zero; give a window LO:HI instead."
        )
    values = np.array([part.values for part in filled])
    weights = np.array([part.count for part in filled], np.float64)
    low, high = (_pooled(values, weights / weights.sum(), percentile / 100) for percentile in percentiles)
    return _distinct(low, high)


def _pooled(values: np.ndarray, weights: np.ndarray, probability: float) -> float:
    """The lowest value that at least `probability` of the pool lies at or below.

    Args:
        values: rising quantiles [K, 1001] of K cases. weights: [K], their sum is 1.
    """
    from scipy.optimize import bisect

    def surplus(value: float) -> float:
        share = weights @ [np.interp(value, row, PROBABILITIES) for row in values]
        return float(share) - probability + 1e-12  # the weights add up to one but for rounding

    low, high = float(values[:, 0].min()), float(values[:, -1].max())
    return low if surplus(low) >= 0 else float(bisect(surplus, low, high))


def _quantiles_above_zero(image: np.ndarray, probabilities: np.ndarray) -> tuple[int, np.ndarray]:
    """How many voxels are above zero, and their linear-interpolated quantiles (zeros if there are none)."""
    counted = image.dtype.kind in "iu" and image.size > 0 and int(image.max()) <= 0xFFFF
    if counted:
        above = value_counts(image)
        above[0] = 0
        cumulative = np.cumsum(above)
        total = int(cumulative[-1])
    else:
        foreground = image[image > 0]
        total = foreground.size
    if not total:
        return 0, np.zeros(probabilities.size)
    ranks = probabilities * (total - 1)
    below = np.floor(ranks).astype(np.int64)
    after = np.minimum(below + 1, total - 1)
    if counted:
        # the value at rank r is the first of which more than r voxels are no larger
        left, right = (np.searchsorted(cumulative, r, side="right").astype(np.float64) for r in (below, after))
    else:
        wanted = np.unique([below, after])
        # a partition is quicker for two percentiles, but its time grows with each rank asked for
        foreground = np.partition(foreground, wanted) if wanted.size < 8 else np.sort(foreground)
        left, right = foreground[below].astype(np.float64), foreground[after].astype(np.float64)
    return total, left + (ranks - below) * (right - left)


def _ramp(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """uint8 of every voxel: `low` and below are 0, `high` and above 255; through a table for 16-bit integers."""

    def ramp(values: np.ndarray) -> np.ndarray:
        scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255.0 / (high - low))
        return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)

    if not (image.dtype.kind in "iu" and image.dtype.itemsize == 2 and image.size > 0xFFFF):
        return np.stack([ramp(part) for part in image])
    # the table is ordered by the bits, so that signed values index it as they are: no search for the smallest value, no
    # subtraction; "clip" only spares numpy a second pass that looks for values out of range
    bits = image.dtype.str[0] + "u2"
    table, out = ramp(np.arange(0x10000).astype(bits).view(image.dtype)), np.empty(image.shape, np.uint8)
    for part, target in zip(image, out, strict=True):
        np.take(table, part.view(bits), out=target, mode="clip")
    return out
