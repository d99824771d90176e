"""Counter-based random numbers on the host: pure functions of their arguments, the same on every platform.

numpy's generators may change their streams between versions; a resumed run must not. The mixing function is
splitmix64 (Steele et al., OOPSLA 2014), for single Python integers (fast for one) and for numpy arrays.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np

Word = TypeVar("Word", int, np.ndarray)
_MASK = (1 << 64) - 1
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(value: Word) -> Word:
    """splitmix64 of one integer in [0, 2**64), or of each of a uint64 array."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _MIX1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX2) & _MASK
    return value ^ (value >> 31)


def combine(*parts: int) -> int:
    """One 64-bit number from several integers, order mattering."""
    value = 0
    for part in parts:
        value = mix(value ^ mix(part & _MASK))
    return value


def seed63(*parts: int) -> int:
    """A seed that fits a signed int64 tensor."""
    return combine(*parts) >> 1


def hashes(stream: int, count: int) -> np.ndarray:
    """uint64 [count]: `mix(stream + i)` for i in 0..count-1, vectorised."""
    return mix(np.arange(count, dtype=np.uint64) + np.uint64(stream & _MASK))


def uniforms(stream: int, count: int) -> np.ndarray:
    """float64 [count] in [0, 1)."""
    return (hashes(stream, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(stream: int, count: int) -> np.ndarray:
    """int32 [count]: a permutation of 0..count-1."""
    return np.argsort(hashes(stream, count), kind="stable").astype(np.int32)


class Counter:
    """A short sequence of numbers for one purpose: `Counter(seed)` always gives the same ones."""

    def __init__(self, *parts: int) -> None:
        self._state = combine(*parts)

    def uniform(self) -> float:
        """The next number in [0, 1)."""
        self._state = (self._state + 1) & _MASK
        return (mix(self._state) >> 11) * 2.0**-53

    def integer(self, count: int) -> int:
        """An integer in [0, count)."""
        return min(int(self.uniform() * count), count - 1)

    def exponential(self) -> float:
        """A number of the standard exponential distribution."""
        return -math.log1p(-self.uniform())

    def weighted(self, weights: np.ndarray) -> int:
        """An index with probability proportional to its non-negative weight; their sum is positive."""
        edges = np.cumsum(weights)
        index = int(np.searchsorted(edges, self.uniform() * edges[-1], side="right"))
        return min(index, int(np.flatnonzero(weights)[-1]))
