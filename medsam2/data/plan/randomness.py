"""Counter-based random numbers on the CPU: pure functions of their arguments, equal on every platform.

A resumed run must draw the same numbers after an upgrade, and numpy's generators may change between versions. The
mixing function is splitmix64 (Steele et al., OOPSLA 2014). It takes Python integers, which are faster for one number,
and uint64 arrays. `medsam2.prompts.randomness` is the counterpart for tensors.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np

Word = TypeVar("Word", int, np.ndarray)
_MASK = (1 << 64) - 1
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(value: Word) -> Word:
    """Return splitmix64 of an integer in [0, 2**64), or of each element of a uint64 array."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _MIX1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX2) & _MASK
    return value ^ (value >> 31)


def combine(*parts: int) -> int:
    """Hash several integers to one 64-bit number; their order matters."""
    value = 0
    for part in parts:
        value = mix(value ^ mix(part & _MASK))
    return value


def seed63(*parts: int) -> int:
    """Hash several integers to a seed below 2**63, which fits a signed int64 tensor."""
    return combine(*parts) >> 1


def hashes(stream: int, count: int) -> np.ndarray:
    """Return `mix(stream + i)` for i in 0..count-1: uint64 [count]."""
    return mix(np.arange(count, dtype=np.uint64) + np.uint64(stream & _MASK))


def uniforms(stream: int, count: int) -> np.ndarray:
    """Return uniform numbers in [0, 1): float64 [count]."""
    return (hashes(stream, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(stream: int, count: int) -> np.ndarray:
    """Return a random permutation of 0..count-1: int32 [count]."""
    return np.argsort(hashes(stream, count), kind="stable").astype(np.int32)


class CounterGenerator:
    """A random number generator whose sequence is a pure function of the integers that it is made from."""

    def __init__(self, *parts: int) -> None:
        self._state = combine(*parts)

    def uniform(self) -> float:
        """Draw a number from [0, 1)."""
        self._state = (self._state + 1) & _MASK
        return (mix(self._state) >> 11) * 2.0**-53

    def integer(self, count: int) -> int:
        """Draw an integer from [0, count)."""
        return min(int(self.uniform() * count), count - 1)

    def exponential(self) -> float:
        """Draw a number from the standard exponential distribution."""
        return -math.log1p(-self.uniform())

    def weighted(self, weights: np.ndarray) -> int:
        """Draw an index with probability proportional to its non-negative weight; the weights must not all be 0."""
        edges = np.cumsum(weights)
        index = int(np.searchsorted(edges, self.uniform() * edges[-1], side="right"))
        return min(index, int(np.flatnonzero(weights)[-1]))
