"""Predicted masks until they are written: compressed, frame by frame, in a temporary file.

Objects prompted on different frames reach a frame at different times (some on the way forward, some on the way back),
and a video is written from its first frame on, wherever the prompt is, so that masks have to wait. They take a few kB
a frame, and memory does not grow with the clip. (A memory map of plain arrays would be shorter, but a long video of
several objects would need tens of GB, and a full disk would end the process by SIGBUS instead of an error.)

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
    """Takes `FrameResult`s in any order; gives a label map, or each object's mask, for any frame.

    Args:
        shape: (T, H, W). values: of the N objects in the label map.
        separate: keep every object's own mask instead of one label map. file: an open temporary file.
    """

    def __init__(self, shape: tuple[int, int, int], values: tuple[int, ...], separate: bool, file: IO[bytes]) -> None:
        self.shape, self.values, self.separate, self._file = shape, values, separate, file
        height_width = shape[1:]
        labels = np.uint8 if max(values) < 256 else np.uint16
        # A frame holds a mask an object, or else a label map and the highest logit so far
        self._frame = np.dtype(
            [("masks", np.uint8, (len(values), *height_width))]
            if separate
            else [("labels", labels, height_width), ("logits", np.float32, height_width)]
        )
        self._places: dict[int, tuple[int, int]] = {}
        self._visits: dict[int, set[int]] = {}

    def add(self, result: FrameResult) -> bool:
        """Keep the masks of one visit of a frame; where objects overlap, the higher logit has the pixel.

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
            higher = plane > frame["logits"]  # they start at 0: below it is background
            frame["logits"][higher], frame["labels"][higher] = plane[higher], self.values[index]
        if not self.separate and len(visited) == len(self.values):
            frame["logits"] = 0  # nobody else comes
        content = zstandard.compress(frame.tobytes(), ZSTD_LEVEL)
        self._places[result.frame] = self._file.seek(0, 2), len(content)
        self._file.write(content)
        return first

    def labels(self, frame: int) -> np.ndarray:
        """Label map [H, W] of a frame; 0 everywhere where no object reached it."""
        return np.ascontiguousarray(self._read(frame)["labels"])

    def mask_of(self, index: int, frame: int) -> np.ndarray:
        """uint8 [H, W] of 0 and 1 of one object; 0 everywhere where it did not reach the frame."""
        return np.ascontiguousarray(self._read(frame)["masks"][index])

    def counts(self) -> tuple[int, ...]:
        """Voxels of each object."""
        total = np.zeros(len(self.values), np.int64)
        for frame in self._places:
            if self.separate:
                total += self._read(frame)["masks"].sum((1, 2), dtype=np.int64)
            else:
                total += np.bincount(self.labels(frame).ravel(), minlength=max(self.values) + 1)[list(self.values)]
        return tuple(total.tolist())

    def _read(self, frame: int) -> np.ndarray:
        """The record of a frame, zeros where no object reached it; [] of it are arrays that may be written."""
        if frame not in self._places:
            return np.zeros((), self._frame)
        place, size = self._places[frame]
        self._file.seek(place)
        return np.frombuffer(bytearray(zstandard.decompress(self._file.read(size))), self._frame).reshape(())


@contextmanager
def open_spool(shape: tuple[int, int, int], values: tuple[int, ...], separate: bool) -> Iterator[Spool]:
    """A spool in a temporary file that is gone afterwards, whatever happens."""
    with tempfile.TemporaryFile(prefix="medsam2-") as file:
        yield Spool(shape, values, separate, file)
