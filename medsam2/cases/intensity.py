"""Convert native intensities to uint8, by modality or by the user's window.

CT: a window of Hounsfield units whose *bounds* map to 0 and 255. MR, PET and other unscaled scans: the 0.5-99.5
percentiles of the voxels above zero; zeros stay zero. RGB and uint8 images are left unchanged.
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
"""Probabilities of `Quantiles`; their spacing bounds the rank error of pooled percentiles to 0.1 % of the voxels."""


def to_uint8(
    case: Case, window: str | Window | None = None, percentiles: tuple[float, float] = PERCENTILES
) -> tuple[np.ndarray, str]:
    """Return the image as uint8 in the case's shape, and the conversion in words, e.g. "-160:240 HU".

    uint8, boolean and RGB images are already scaled: modality and window do not change them.

    Args:
        window: (low, high), mapped to 0 and 255; "dicom" for the window stored in the source; "percentiles"; or a
            preset in HU, which applies to CT only (other scans use their default). None is the default of the
            modality: abdomen for CT, else percentiles.
        percentiles: percentiles of the voxels above zero, mapped to 0 and 255.

    Raises:
        CaseError: the image is empty, RGB is not uint8, no voxel lies above zero, or the source stores no window.
    """
    image = case.image
    if not any(part.any() for part in image):  # stops at the first slice that is not empty
        raise CaseError(f"{case.where}: the image is empty: every voxel is 0. Check the file, or leave the case out.")
    if image.dtype == np.uint8:
        return image, "as stored"
    if image.dtype == np.bool_:
        return image.astype(np.uint8) * np.uint8(255), "as stored"
    if image.ndim == 4:
        raise CaseError(
            f"{case.where}: RGB of type {image.dtype} is not supported. Convert it to 8 bits per channel first."
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
    """Return the window as (low, high), or None for percentiles of the case."""
    if window == "dataset-percentiles":
        raise CaseError(f"{case.where}: window {window!r} needs all cases, and only one is read; give LO:HI.")
    if window == "dicom":
        if case.window is None:
            raise CaseError(
                f"{case.where}: window 'dicom': the source stores no window (tags WindowCenter and WindowWidth). "
                "Set window to LO:HI, a preset or percentiles for this dataset."
            )
        window = case.window
    elif window == "percentiles" or (window in (None, *WINDOW_PRESETS) and case.modality != "CT"):
        return None
    return window if isinstance(window, tuple) else WINDOW_PRESETS[window or "abdomen"]


def percentiles_above_zero(image: np.ndarray, where: str, percentiles: tuple[float, float] = PERCENTILES) -> Window:
    """Return two percentiles of the voxels above zero, as `numpy.percentile` computes them.

    If both are equal (a binary image), return zero and that value, so that the image does not become black.

    Raises:
        CaseError: no voxel lies above zero.
    """
    total, (low, high) = _quantiles_above_zero(image, np.asarray(percentiles, np.float64) / 100)
    if not total:
        raise CaseError(f"{where}: no voxel above zero; the image is empty or needs a --window.")
    return _nonempty_window(float(low), float(high))


def _nonempty_window(low: float, high: float) -> Window:
    return (low, high) if high > low else (0.0, high)


@dataclass(frozen=True)
class Quantiles:
    """Quantiles of the voxels above zero of a case; small enough to keep for every case of a dataset.

    Attributes:
        count: number of voxels above zero. values: their quantiles at `PROBABILITIES`; empty if there are none.
    """

    count: int
    values: tuple[float, ...]


def case_quantiles(case: Case) -> Quantiles:
    """Compute the quantiles of the voxels above zero."""
    total, values = _quantiles_above_zero(case.image, PROBABILITIES)
    return Quantiles(total, tuple(values.tolist()) if total else ())


def merge_quantiles(parts: Sequence[Quantiles], percentiles: tuple[float, float] = PERCENTILES) -> Window:
    """Return two percentiles of the voxels above zero of all cases; the order of the cases does not matter.

    Quantiles are interpolated linearly, so that the rank of the result is off by at most 0.1 %.

    Raises:
        CaseError: no case has a voxel above zero.
    """
    nonempty = sorted((part for part in parts if part.count), key=lambda part: (part.count, part.values))
    if not nonempty:
        raise CaseError(
            f"dataset-percentiles: none of {len(parts)} cases has a voxel above zero; set a window LO:HI instead."
        )
    values = np.array([part.values for part in nonempty])
    weights = np.array([part.count for part in nonempty], np.float64)
    low, high = (_pooled_quantile(values, weights / weights.sum(), percentile / 100) for percentile in percentiles)
    return _nonempty_window(low, high)


def _pooled_quantile(values: np.ndarray, weights: np.ndarray, probability: float) -> float:
    """Return the lowest value with at least `probability` of the pooled voxels at or below it.

    Args:
        values: ascending quantiles [K, 1001] of K cases. weights: [K], with sum 1.
    """
    from scipy.optimize import bisect

    def surplus(value: float) -> float:
        share = weights @ [np.interp(value, row, PROBABILITIES) for row in values]
        return float(share) - probability + 1e-12  # the sum of the weights is 1 up to rounding

    low, high = float(values[:, 0].min()), float(values[:, -1].max())
    return low if surplus(low) >= 0 else float(bisect(surplus, low, high))


def _quantiles_above_zero(image: np.ndarray, probabilities: np.ndarray) -> tuple[int, np.ndarray]:
    """Count the voxels above zero, and interpolate their quantiles linearly (zeros if there are none)."""
    use_histogram = image.dtype.kind in "iu" and image.size > 0 and int(image.max()) <= 0xFFFF
    if use_histogram:
        histogram = value_counts(image)
        histogram[0] = 0
        cumulative = np.cumsum(histogram)
        total = int(cumulative[-1])
    else:
        foreground = image[image > 0]
        total = foreground.size
    if not total:
        return 0, np.zeros(probabilities.size)
    ranks = probabilities * (total - 1)
    below = np.floor(ranks).astype(np.int64)
    after = np.minimum(below + 1, total - 1)
    if use_histogram:
        # the value at rank r is the first with a cumulative count above r
        left, right = (np.searchsorted(cumulative, r, side="right").astype(np.float64) for r in (below, after))
    else:
        indices = np.unique([below, after])
        # np.partition is faster than a full sort for two percentiles, but slows down with every further rank
        foreground = np.partition(foreground, indices) if indices.size < 8 else np.sort(foreground)
        left, right = foreground[below].astype(np.float64), foreground[after].astype(np.float64)
    return total, left + (ranks - below) * (right - left)


def _ramp(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map `low` and below to 0, and `high` and above to 255; 16-bit integers use a lookup table."""

    def ramp(values: np.ndarray) -> np.ndarray:
        scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255.0 / (high - low))
        return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)

    if not (image.dtype.kind in "iu" and image.dtype.itemsize == 2 and image.size > 0xFFFF):
        return np.stack([ramp(part) for part in image])
    # The table is ordered by bit pattern, so that signed values index it through an unsigned view. mode="clip" saves
    # numpy a second pass that checks for indices out of range.
    bits = image.dtype.str[0] + "u2"
    table, out = ramp(np.arange(0x10000).astype(bits).view(image.dtype)), np.empty(image.shape, np.uint8)
    for part, target in zip(image, out, strict=True):
        np.take(table, part.view(bits), out=target, mode="clip")
    return out
