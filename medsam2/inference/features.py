"""A cache of encoder features of a clip's frames, which encodes frames in batches."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from medsam2.model.tracker import Features, Tracker
from medsam2.pixels import normalise

MAX_CPU_BATCH_PIXELS = 1 << 18
"""Pixels per encoder batch on a CPU; larger batches exceed its cache, need gigabytes and are not faster."""

Direction = Literal["forward", "backward", "both", "both_apart", "front_to_end", "alone"]


class Frames(Protocol):
    """A clip: uint8 frames [C, H, W], C = 1 or 3, by index; for example a tensor [T, C, H, W] or a lazy reader."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


class FrameFeatures:
    """Least-recently-used cache of the features of up to `capacity` frames.

    A miss encodes `batch` frames: the requested one and the next ones in the direction of travel. A clip of up to
    `capacity` frames is therefore encoded exactly once, a longer one at most twice.
    """

    def __init__(self, tracker: Tracker, frames: Frames, batch: int, capacity: int) -> None:
        self._tracker, self._frames = tracker, frames
        if tracker.device.type == "cpu":
            batch = max(min(batch, MAX_CPU_BATCH_PIXELS // tracker.image_size**2), 1)
        self._batch, self._capacity = batch, max(capacity, batch)
        self._cache: dict[int, Features] = {}
        self.encoded = 0

    def at(self, frame: int, count: int, step: int = 1) -> Features:
        """Return the features of `frame` repeated for `count` objects; `step` is +1 or -1, the direction of travel."""
        if frame not in self._cache:
            self._encode(frame, step)
        features = self._cache[frame] = self._cache.pop(frame)  # moves it to the end, to be evicted last
        return features.select(torch.zeros(count, dtype=torch.int64, device=features.embed.device))

    def _encode(self, frame: int, step: int) -> None:
        candidates = range(frame, frame + step * self._batch, step)
        missing = [t for t in candidates if 0 <= t < len(self._frames) and t not in self._cache]
        pixels = torch.stack([torch.as_tensor(self._frames[t]) for t in missing]).to(self._tracker.device)
        features = self._tracker.encode(normalise(pixels, self._tracker.image_size))
        self.encoded += len(missing)
        for row, t in reversed(list(enumerate(missing))):  # the frame that is needed last is evicted first
            self._cache[t] = features.select(torch.tensor([row], device=pixels.device))
        for t in list(self._cache)[: max(len(self._cache) - self._capacity, 0)]:
            del self._cache[t]
