"""Counter-based random numbers on the device: a pure function of (seed, tag, counter).

A generator's state depends on what was drawn before; these numbers do not, so that an object gets the same
prompts on whatever rank, in whatever batch and after whatever resumption, without a synchronisation with the host.
The mixing function is splitmix64 (Steele et al., OOPSLA 2014) in wrapping int64 arithmetic.

Legend: K seeds (clips or objects).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical (not arithmetic) right shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mix(value: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, wrapping."""
    value = value + _GOLDEN
    value = (value ^ _shift(value, 30)) * _MIX1
    value = (value ^ _shift(value, 27)) * _MIX2
    return value ^ _shift(value, 31)


def uniform(seeds: Tensor, tag: int, count: int = 1) -> Tensor:
    """`count` numbers in [0, 1) for each seed: int64 [K] -> float32 [K, count].

    `tag` names the use (one integer for each place that draws), so that uses are independent.
    """
    counter = torch.arange(count, device=seeds.device, dtype=torch.int64)
    stream = mix(mix(seeds.to(torch.int64)) + tag * 1_000_003)
    bits = mix(stream[:, None] + counter[None, :])
    return _shift(bits, 40).to(torch.float32) * (1.0 / (1 << 24))


def normal(seeds: Tensor, tag: int, count: int = 1) -> Tensor:
    """Standard normal numbers (Box-Muller), float32 [K, count]."""
    pairs = uniform(seeds, tag, 2 * count)
    radius = torch.sqrt(-2.0 * torch.log1p(-pairs[:, :count]))
    return radius * torch.cos(2.0 * math.pi * pairs[:, count:])


class Draws:
    """Host-side numbers that a whole batch shares, from (seed, step): the same on every rank.

    >>> Draws(0, 7).number() == Draws(0, 7).number()
    True
    """

    def __init__(self, seed: int, step: int) -> None:
        self._state = torch.tensor([seed * 2_654_435_761 + step], dtype=torch.int64)
        self._next = 0

    def number(self) -> float:
        """The next number in [0, 1)."""
        self._next += 1
        return float(uniform(self._state, self._next)[0, 0])

    def integer(self, low: int, high: int) -> int:
        """An integer in [low, high], both included."""
        return low + min(int(self.number() * (high - low + 1)), high - low)

    def choice(self, weights: dict[str, float]) -> str:
        """A key with probability proportional to its weight."""
        names = [name for name, weight in weights.items() if weight > 0]
        point = self.number() * sum(weights[name] for name in names)
        for name in names[:-1]:
            point -= weights[name]
            if point < 0:
                return name
        return names[-1]

    def sample(self, population: list[int], count: int) -> list[int]:
        """`count` different members, in ascending order."""
        pool = list(population)
        return sorted(pool.pop(self.integer(0, len(pool) - 1)) for _ in range(min(count, len(pool))))
