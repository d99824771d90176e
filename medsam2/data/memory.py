"""Arrays on the CPU that are used again as soon as nobody refers to them.

Touching fresh pages takes as long as everything that augmentation computes: a batch of eight 512-pixel clips is 200 MB
of floats. Whoever still holds a view of an array, or a tensor made of one, keeps it from being used again.
"""

from __future__ import annotations

import math
import sys

import numpy as np
import numpy.typing as npt

KEPT = 6  # arrays that are remembered
_HELD = 3  # references to an array that nobody uses: the list's, the loop's, and that of `getrefcount`


class Memory:
    """Gives arrays of any shape; their content is whatever it was."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
        """A C-contiguous array that nobody else uses."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        for array in self._arrays:
            if size <= len(array) <= 2 * size and sys.getrefcount(array) == _HELD:
                found: np.ndarray = array[:size].view(kind).reshape(shape)
                return found
        fresh = np.empty(size, np.uint8)  # numpy asks the system for huge pages
        self._arrays = [*self._arrays[1 - KEPT :], fresh]
        return fresh.view(kind).reshape(shape)


MEMORY = Memory()
"""That of this process."""
