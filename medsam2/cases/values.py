"""Count integer values slice by slice, without a copy of the whole volume."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medsam2.cases.case import CaseError

MAX_LABEL = np.iinfo(np.uint16).max
"""Labels are stored as uint8 or uint16."""


def byte_counts(part: np.ndarray) -> np.ndarray:
    """Count 0 ... 255 in a uint8 array of fewer than 2^24 values, several times as fast as `np.bincount`."""
    import cv2

    flat = np.ascontiguousarray(part).reshape(1, -1)
    return cv2.calcHist([flat], [0], None, [256], [0, 256]).ravel().astype(np.int64)


def value_counts(array: np.ndarray) -> np.ndarray:
    """Count 0, 1, 2 ... in [T, ...] integers; negative values count as 0."""
    if array.dtype == np.uint8 and array.size and array[0].size < 1 << 24:
        histogram = sum((byte_counts(part) for part in array), np.zeros(256, np.int64))
        return np.asarray(histogram[: int(np.flatnonzero(histogram)[-1]) + 1])
    length = int(array.max(initial=0)) + 1
    total = np.zeros(length, np.int64)
    for part in array:
        flat = part.ravel()
        total += np.bincount(flat if flat.dtype.kind == "u" else np.maximum(flat, 0), minlength=length)
    return total


def present_values(mask: np.ndarray) -> list[int]:
    """Return the label values of [T, H, W], ascending, without background."""
    return [int(value) for value in np.flatnonzero(value_counts(mask)) if value]


def as_labels(array: np.ndarray, path: Path) -> np.ndarray:
    """Convert a mask to uint8, or to uint16 if a value exceeds 255; fractions (probabilities) become float32.

    Raises:
        CaseError: negative, infinite or NaN values, or labels beyond 65535.
    """
    if array.dtype in (np.uint8, np.uint16):
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8)  # not a view: some libraries store True as 255
    low, high = array.min(initial=0), array.max(initial=0)
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > MAX_LABEL:
        raise CaseError(f"{path}: label values {low}..{high} must lie between 0 and {MAX_LABEL}.")
    if array.dtype.kind == "f" and not all(np.array_equal(part, np.rint(part)) for part in array):
        return array.astype(np.float32, copy=False)
    return array.astype(np.uint8 if high < 256 else np.uint16)
