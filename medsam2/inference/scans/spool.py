"""Store predicted masks in a temporary file, compressed frame by frame, until they are written.

The objects of a frame may be predicted at different times (some in the forward pass, some in the backward pass), and a
video is written from its first frame, wherever the prompt is; therefore masks are stored first. They take a few kB per
frame on disk, and memory use does not grow with the clip. (A memory map of plain arrays would need less code, but tens
of GB for a long video of several objects, and a full disk would end the process by SIGBUS instead of an error.)

Legend: N objects, T frames, H and W pixels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
import zstandard

from medsam2.inference.predictor import FrameResult

ZSTD_LEVEL = 1


class Spool:
    """Accepts `FrameResult`s in any order; returns the label map or the mask of each object for any frame.

    Args:
        shape: (T, H, W). values: values of the N objects in the label map.
        separate: store one mask per object instead of one label map. file: an open temporary file.
    """

    def __init__(self, shape: tuple[int, int, int], values: tuple[int, ...], separate: bool, file: IO[bytes]) -> None:
        self.shape, self.values, self.separate, self._file = shape, values, separate, file
        height_width = shape[1:]
        labels = np.uint8 if max(values) < 256 else np.uint16
        # A record holds one mask per object, or else a label map and the highest logit so far.
        self._frame = np.dtype(
            [("masks", np.uint8, (len(values), *height_width))]
            if separate
            else [("labels", labels, height_width), ("logits", np.float32, height_width)]
        )
        self._places: dict[int, tuple[int, int]] = {}
        self._visits: dict[int, set[int]] = {}

    def add(self, result: FrameResult) -> bool:
        """Store the masks of one visit of a frame; where objects overlap, the one with the higher logit gets the pixel.

        Returns:
            Whether this was the frame's first visit.
        """
        first, frame = result.frame not in self._places, self._read(result.frame)
        visited = self._visits.setdefault(result.frame, set())
        visited.update(result.objects)
        planes = dict(zip(result.objects, result.logits.float().cpu().numpy(), strict=True))
        for index, plane in sorted(planes.items()):
            if self.separate:
                frame["masks"][index] = plane > 0
                continue
            higher = plane > frame["logits"]  # the initial value is 0, since logits below 0 are background
            frame["logits"][higher], frame["labels"][higher] = plane[higher], self.values[index]
        if not self.separate and len(visited) == len(self.values):
            frame["logits"] = 0  # no object is left to compare with, and zeros compress well
        content = zstandard.compress(frame.tobytes(), ZSTD_LEVEL)
        self._places[result.frame] = self._file.seek(0, 2), len(content)
        self._file.write(content)
        return first

    def labels(self, frame: int) -> np.ndarray:
        """Return the label map [H, W] of a frame; all 0 if no object was predicted there."""
        return np.ascontiguousarray(self._read(frame)["labels"])

    def mask_of(self, index: int, frame: int) -> np.ndarray:
        """Return the mask of one object, uint8 [H, W] of 0 and 1; all 0 if it was not predicted on the frame."""
        return np.ascontiguousarray(self._read(frame)["masks"][index])

    def counts(self) -> tuple[int, ...]:
        """Return the number of voxels of each object."""
        total = np.zeros(len(self.values), np.int64)
        for frame in self._places:
            if self.separate:
                total += self._read(frame)["masks"].sum((1, 2), dtype=np.int64)
            else:
                total += np.bincount(self.labels(frame).ravel(), minlength=max(self.values) + 1)[list(self.values)]
        return tuple(total.tolist())

    def _read(self, frame: int) -> np.ndarray:
        """Return the record of a frame, zeros if no object was predicted there; its fields are writable arrays."""
        if frame not in self._places:
            return np.zeros((), self._frame)
        offset, size = self._places[frame]
        self._file.seek(offset)
        return np.frombuffer(bytearray(zstandard.decompress(self._file.read(size))), self._frame).reshape(())


@contextmanager
def open_spool(shape: tuple[int, int, int], values: tuple[int, ...], separate: bool) -> Iterator[Spool]:
    """Open a spool in a temporary file, which is deleted when the context ends."""
    with tempfile.TemporaryFile(prefix="medsam2-") as file:
        yield Spool(shape, values, separate, file)
