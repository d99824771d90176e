"""Native intensities -> uint8, by modality.

CT: a window of Hounsfield units whose *bounds* map to 0 and 255. MR, PET and other unscaled scans: the 0.5-99.5
percentiles of the voxels above zero, zeros stay zero. RGB and uint8 pictures are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medsam2.cases.case import Case, CaseError
from medsam2.cases.values import counts
from medsam2.errors import UserError, did_you_mean

Window = tuple[float, float]

WINDOWS: dict[str, Window] = {
    "abdomen": (-160.0, 240.0),
    "lung": (-1350.0, 150.0),
    "brain": (0.0, 80.0),
    "mediastinum": (-125.0, 225.0),
    "bone": (-500.0, 1300.0),
}
"""CT presets as (low, high) HU: level -/+ half the width (abdomen 40/400, lung -600/1500, ...)."""

PERCENTILES = (0.5, 99.5)


def parse_window(text: str) -> Window:
    """`-160:240` or the name of a preset.

    Raises:
        UserError: neither, or low is not below high.
    """
    if text in WINDOWS:
        return WINDOWS[text]
    low, colon, high = text.partition(":")
    try:
        window = (float(low), float(high))
    except ValueError:
        hint = did_you_mean(text, WINDOWS)
        raise UserError(
            f"--window {text!r}: expected LO:HI, e.g. -160:240, or one of {', '.join(WINDOWS)}.{hint}"
        ) from None
    if not window[0] < window[1]:
        raise UserError(f"--window {text!r}: the lower bound must be below the upper one.")
    return window


def to_uint8(case: Case, window: Window | None = None) -> tuple[np.ndarray, str]:
    """uint8 image of the case's shape, and what was done, e.g. "-160:240 HU".

    Args:
        window: (low, high) that map to 0 and 255; default by modality.

    Raises:
        CaseError: RGB that is not uint8, or nothing to scale (no voxel above zero).
    """
    image = case.image
    if image.dtype == np.uint8:
        return image, "as stored"
    if image.dtype == np.bool_:
        return image.astype(np.uint8) * np.uint8(255), "as stored"
    if image.ndim == 4:
        raise CaseError(f"{case.where}: RGB of type {image.dtype}; only uint8 is read. Convert it first.")
    if window is None and case.modality == "CT":
        window = WINDOWS["abdomen"]
    if window is not None:
        low, high = window
        unit = " HU" if case.modality == "CT" else ""
        return _map(image, _ramp(low, high)), f"{low:g}:{high:g}{unit}"
    low, high = percentiles_above_zero(image, case.where)
    ramp = _ramp(low, high)

    def keep_zero(values: np.ndarray) -> np.ndarray:
        return np.where(values == 0, np.uint8(0), ramp(values))

    return _map(image, keep_zero), f"{low:g}:{high:g} (percentiles {PERCENTILES[0]}-{PERCENTILES[1]} above zero)"


def percentiles_above_zero(image: np.ndarray, where: str) -> Window:
    """The 0.5 and 99.5 percentiles of the voxels above zero, as `numpy.percentile` gives them."""
    if image.dtype.kind in "iu" and image.size and int(image.max()) <= 0xFFFF:
        above = counts(image)
        above[0] = 0
        total = int(above.sum())
        low, high = _from_counts(np.cumsum(above), total) if total else (0.0, 0.0)
    else:
        foreground = image[image > 0]
        total = foreground.size
        low, high = (float(v) for v in np.percentile(foreground, PERCENTILES)) if total else (0.0, 0.0)
    if not total:
        raise CaseError(f"{where}: no voxel above zero; the image is empty or needs a --window.")
    return low, high if high > low else low + 1.0


def _from_counts(cumulative: np.ndarray, total: int) -> Window:
    """Linear-interpolated percentiles from cumulative counts of the values 0, 1, 2 ..."""
    bounds = []
    for percentile in PERCENTILES:
        rank = percentile / 100 * (total - 1)
        below = int(np.floor(rank))
        at = np.searchsorted(cumulative, [below, min(below + 1, total - 1)], side="right")
        bounds.append(float(at[0] + (rank - below) * (at[1] - at[0])))
    return bounds[0], bounds[1]


def _ramp(low: float, high: float) -> Callable[[np.ndarray], np.ndarray]:
    def ramp(values: np.ndarray) -> np.ndarray:
        scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255.0 / (high - low))
        return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)

    return ramp


def _map(image: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`function` of every voxel, slice by slice; through a table for integers of a small range."""
    out = np.empty(image.shape, np.uint8)
    if image.dtype.kind in "iu" and image.size:
        low, high = int(image.min()), int(image.max())
        if high - low <= 0xFFFF:
            table = function(np.arange(low, high + 1))
            for index in range(image.shape[0]):
                np.take(table, image[index].astype(np.int64) - low, out=out[index])
            return out
    for index in range(image.shape[0]):
        out[index] = function(image[index])
    return out
