"""Masks of a whole volume or clip in one bit a pixel: what a prediction keeps while frames stream by.

Legend: T frames, H and W pixels.
"""

from __future__ import annotations

import numpy as np


class PackedMask:
    """A bool mask [T, H, W] of which frames are set one by one; frames that were never set are empty.

    Args:
        shape: (T, H, W).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._frames: dict[int, np.ndarray] = {}

    def add(self, frame: int, mask: np.ndarray) -> None:
        """Join bool [H, W] to what is on a frame."""
        bits = np.packbits(mask)
        self._frames[frame] = self._frames[frame] | bits if frame in self._frames else bits

    def put(self, frame: int, mask: np.ndarray) -> None:
        """Set a frame to bool [H, W]."""
        self._frames[frame] = np.packbits(mask)

    def __contains__(self, frame: int) -> bool:
        return frame in self._frames

    def frame(self, frame: int) -> np.ndarray:
        """bool [H, W]."""
        _, height, width = self.shape
        if frame not in self._frames:
            return np.zeros((height, width), dtype=bool)
        return np.unpackbits(self._frames[frame], count=height * width).reshape(height, width).astype(bool)

    def keep(self, first: int, last: int) -> None:
        """Empty the frames before `first` and after `last`."""
        self._frames = {frame: bits for frame, bits in self._frames.items() if first <= frame <= last}

    def dense(self) -> np.ndarray:
        """bool [T, H, W]."""
        whole = np.zeros(self.shape, dtype=bool)
        for frame in self._frames:
            whole[frame] = self.frame(frame)
        return whole
