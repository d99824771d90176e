"""What a corruption sees of a case, and what it gives back.

Legend: T frames, H and W pixels, C channels (1 or 3).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

REFERENCE_SIDE = 224  # pixels: the pictures that ImageNet-C's lengths are made for

FrameFunction = Callable[[int, np.ndarray], np.ndarray]
"""(t, frame float32 [H, W, C] in 0..1) -> frame of the same shape; values beyond 0..1 are clipped by the caller."""


@dataclass(frozen=True, eq=False)
class Scene:
    """One case.

    Attributes:
        frames: uint8 [T, H, W, C]. planes: integer label planes [P, T, H, W].
        spacing: (z or t, y, x). kind: volume, clip or still. modality: as in `Case`.
        key: whole numbers (seed, case, corruption) that all random numbers come from. The severity is not among them:
            the smoke of severity 5 is that of severity 1, only denser, so that luck does not bend a curve over the
            severities.
    """

    frames: np.ndarray
    planes: np.ndarray
    spacing: tuple[float, float, float]
    kind: str
    modality: str
    key: tuple[int, ...]

    @property
    def length(self) -> int:
        return int(self.frames.shape[0])

    @property
    def height(self) -> int:
        return int(self.frames.shape[1])

    @property
    def width(self) -> int:
        return int(self.frames.shape[2])

    @property
    def scale(self) -> float:
        """Pixels of this case per pixel of a picture of 224: lengths are shares of the shorter side."""
        return min(self.height, self.width) / REFERENCE_SIDE

    def shared(self, stream: str = "") -> np.random.Generator:
        """Numbers that belong to the whole case."""
        return np.random.default_rng([*self.key, zlib.crc32(stream.encode())])

    def own(self, t: int, stream: str = "") -> np.random.Generator:
        """Numbers that belong to frame `t` alone, whatever other frames were computed before."""
        return np.random.default_rng([*self.key, zlib.crc32(stream.encode()), t + 1])

    def frame(self, t: int) -> np.ndarray:
        """float32 [H, W, C] in 0..1 of the clean case; `t` beyond an end gives the frame at that end."""
        return self.frames[min(max(t, 0), self.length - 1)].astype(np.float32) / 255.0


@dataclass(frozen=True)
class Corruption:
    """One kind of damage.

    Attributes:
        name: unique. suite: imagenet_c, surgical or medical.
        plan: (scene, severity 1..5) -> the function of a frame. What a case shares is drawn in `plan`.
        modalities, kinds: where it makes sense; empty for everywhere.
    """

    name: str
    suite: str
    plan: Callable[[Scene, int], FrameFunction]
    modalities: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    def fits(self, modality: str, kind: str) -> bool:
        """Whether it makes sense for such a case."""
        return (not self.modalities or modality in self.modalities) and (not self.kinds or kind in self.kinds)
