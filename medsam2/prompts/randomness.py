"""Counter-based random numbers on the device: a pure function of (seed, stream, frame, step, counter).

Unlike those of a generator, these numbers do not depend on earlier draws. An object therefore gets the same prompts on
any rank, in any batch and after resuming, without synchronising device and host. The mixing function is splitmix64
(Steele et al., OOPSLA 2014) in wrapping int64 arithmetic.

Legend: K seeds (clips or objects).
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor


class RandomStream(IntEnum):
    """A separate number for each use of random numbers in training, so that the uses are independent.

    Changing a number changes what a seed draws. `AUGMENTATION`, `BOX_JITTER` and `STILLS` share a number but never a
    seed, since they belong to a clip, to an object and to the whole run.
    """

    # With the run's seed, in `medsam2.data.plan`
    CLIP_ORDER = 1
    MIXTURE = 2
    CLIP = 3
    VALIDATION_CLIP = 4
    CLIPS_OR_STILLS = 5
    PROMPT_FRAME = 6
    DROPOUT = 31
    STILLS = 101
    # With a clip's seed
    AUGMENTATION = 101
    FRAME_AUGMENTATION = 102
    # With an object's seed and a frame
    TARGET_SHAPE = 11
    EMBEDDING_NOISE = 13
    BOX_JITTER = 101
    BOX_SCALE = 643
    BOX_GROWTH = 644
    CLICK = 211
    CORRECTION_FROM_TRUTH = 307
    MASK_DAMAGE = 401
    MASK_HOLES = 402
    POSITIVE_POINTS = 613
    NEGATIVES_NEARBY = 614
    NEGATIVES_ON_OTHERS = 615
    NUMBER_OF_POINTS = 616
    NEGATIVE_ON_OTHER = 618
    RECIST_ENDS = 623
    SCRIBBLE_START = 633
    SCRIBBLE_HEADING = 634
    SCRIBBLE_BENDS = 635


# The constants of splitmix64 as signed 64-bit integers, since torch has no arithmetic for uint64.
_GOLDEN, _MIX1, _MIX2 = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(value: Tensor, bits: int) -> Tensor:
    """Shift int64 to the right and fill with zeros (a logical, not an arithmetic shift)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mix(value: Tensor) -> Tensor:
    """Return splitmix64 of each element of an int64 tensor, wrapping."""
    value = value + _GOLDEN
    value = (value ^ _shift(value, 30)) * _MIX1
    value = (value ^ _shift(value, 27)) * _MIX2
    return value ^ _shift(value, 31)


def combine(seeds: Tensor, stream: int, frame: int = 0, step: int = 0) -> Tensor:
    """Hash seeds int64 [K] with a stream, frame and step to the states [K] of independent sequences.

    Args:
        stream: a `RandomStream`. frame: index in the clip. step: 1 for the first correction of a frame, 0 for none.
    """
    number = 1000 * frame + 10 * step + stream
    return mix(mix(seeds.to(torch.int64)) + number * 1_000_003)


def uniform(seeds: Tensor, stream: int, count: int = 1, frame: int = 0, step: int = 0) -> Tensor:
    """Draw `count` numbers from [0, 1) for each seed: float32 [K, count]; arguments as in `combine`."""
    counter = torch.arange(count, device=seeds.device, dtype=torch.int64)
    bits = mix(combine(seeds, stream, frame, step)[:, None] + counter[None, :])
    return _shift(bits, 40).to(torch.float32) * (1.0 / (1 << 24))


def normal(seeds: Tensor, stream: int, count: int = 1, frame: int = 0, step: int = 0) -> Tensor:
    """Draw `count` standard normal numbers (Box-Muller) for each seed: float32 [K, count]; arguments: `combine`."""
    pairs = uniform(seeds, stream, 2 * count, frame, step)
    radius = torch.sqrt(-2.0 * torch.log1p(-pairs[:, :count]))
    return radius * torch.cos(2.0 * math.pi * pairs[:, count:])


class Draws:
    """Random numbers on the CPU that a batch shares: a function of (seed, step), equal on every rank.

    >>> Draws(0, 7).number() == Draws(0, 7).number()
    True
    """

    def __init__(self, seed: int, step: int) -> None:
        self._state = torch.tensor([seed * 2_654_435_761 + step], dtype=torch.int64)
        self._next = 0

    def number(self) -> float:
        """Draw a number from [0, 1)."""
        self._next += 1
        return float(uniform(self._state, self._next)[0, 0])

    def integer(self, low: int, high: int) -> int:
        """Draw an integer from [low, high], both included."""
        return low + min(int(self.number() * (high - low + 1)), high - low)

    def choice(self, weights: dict[str, float]) -> str:
        """Draw a key with probability proportional to its weight."""
        names = [name for name, weight in weights.items() if weight > 0]
        point = self.number() * sum(weights[name] for name in names)
        for name in names[:-1]:
            point -= weights[name]
            if point < 0:
                return name
        return names[-1]

    def sample(self, population: list[int], count: int) -> list[int]:
        """Draw up to `count` distinct members; return them in ascending order."""
        pool = list(population)
        return sorted(pool.pop(self.integer(0, len(pool) - 1)) for _ in range(min(count, len(pool))))
