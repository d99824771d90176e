"""Counting integer values slice by slice, so that no copy of a whole volume is made."""

from __future__ import annotations

import numpy as np


def counts(array: np.ndarray) -> np.ndarray:
    """How often 0, 1, 2 ... occur in [T, ...] integers; negative values count as 0."""
    length = int(array.max(initial=0)) + 1
    total = np.zeros(length, np.int64)
    for part in array:
        flat = part.ravel()
        total += np.bincount(flat if flat.dtype.kind == "u" else np.maximum(flat, 0), minlength=length)
    return total


def present_values(mask: np.ndarray) -> list[int]:
    """The label values of [T, H, W], ascending, without background."""
    return [int(value) for value in np.flatnonzero(counts(mask)) if value]
