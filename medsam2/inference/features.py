"""Encoder features of a clip's frames: encoded in batches along the way, each once while it is held."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from medsam2.model.tracker import Features, Tracker
from medsam2.pixels import normalise

CPU_PIXELS = 1 << 18
"""A CPU encodes so many pixels at a time: more gain nothing, leave its cache, and need gigabytes."""


class Frames(Protocol):
    """A clip: uint8 frames [C, H, W], C = 1 or 3, by index. A uint8 tensor [T, C, H, W] is one; so is a lazy reader."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


class FrameFeatures:
    """Features by frame, at most `capacity` frames of them held.

    A miss encodes the frame and the next ones in the direction of travel, `batch` in all. What was used longest ago
    is dropped first, so a clip of up to `capacity` frames is encoded exactly once, a longer one at most twice.
    """

    def __init__(self, tracker: Tracker, frames: Frames, batch: int, capacity: int) -> None:
        self._tracker, self._frames = tracker, frames
        if tracker.device.type == "cpu":
            batch = max(min(batch, CPU_PIXELS // tracker.image_size**2), 1)
        self._batch, self._capacity = batch, max(capacity, batch)
        self._held: dict[int, Features] = {}
        self.encoded = 0

    def at(self, frame: int, count: int, step: int = 1) -> Features:
        """Features of `frame` repeated for `count` objects; `step` is +1 or -1, the direction of travel."""
        if frame not in self._held:
            self._encode(frame, step)
        features = self._held[frame] = self._held.pop(frame)  # the newest in the order of dropping
        return features.select(torch.zeros(count, dtype=torch.int64, device=features.embed.device))

    def _encode(self, frame: int, step: int) -> None:
        ahead = range(frame, frame + step * self._batch, step)
        wanted = [t for t in ahead if 0 <= t < len(self._frames) and t not in self._held]
        pixels = torch.stack([torch.as_tensor(self._frames[t]) for t in wanted]).to(self._tracker.device)
        features = self._tracker.encode(normalise(pixels, self._tracker.image_size))
        self.encoded += len(wanted)
        for place, t in reversed(list(enumerate(wanted))):  # the one needed last is the first to be dropped
            self._held[t] = features.select(torch.tensor([place], device=pixels.device))
        for t in list(self._held)[: max(len(self._held) - self._capacity, 0)]:
            del self._held[t]
