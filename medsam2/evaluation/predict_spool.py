"""Predicted masks until they are written: compressed, frame by frame, in a temporary file.

Objects prompted on different frames reach a frame at different times (some on the way forward, some on the way back),
and a video is written from its first frame on, wherever the prompt is; so masks wait here, a few kB a frame, and memory
does not grow with the clip.

Legend: N objects, T frames, H and W pixels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
import zstandard

from medsam2.evaluation.predictor import FrameResult

LEVEL = 1


class Spool:
    """Takes `FrameResult`s in any order; gives a label map, or each object's mask, for any frame.

    Args:
        shape: (T, H, W). values: of the N objects in the label map.
        separate: keep every object's own mask instead of one label map.
        file: an open temporary file.

    Attributes:
        counts: voxels of each object so far, as they will be written.
    """

    def __init__(self, shape: tuple[int, int, int], values: tuple[int, ...], separate: bool, file: IO[bytes]) -> None:
        self.shape, self.values, self.separate = shape, values, separate
        self.dtype = np.dtype(np.uint8 if max(values) < 256 else np.uint16)
        self._file = file
        self._places: dict[tuple[str, int, int], tuple[int, int]] = {}
        self._seen: dict[int, set[int]] = {}
        self.counts = np.zeros(len(values), np.int64)
        self._pack, self._unpack = zstandard.ZstdCompressor(level=LEVEL), zstandard.ZstdDecompressor()

    def add(self, result: FrameResult) -> bool:
        """Keep what was found on one visit of a frame; where objects overlap, the higher logit has the pixel.

        Returns:
            Whether this was the frame's first visit.
        """
        logits = result.logits.float().cpu().numpy()
        seen = self._seen.setdefault(result.frame, set())
        first = not seen
        seen.update(result.objects)
        if self.separate:
            for index, plane in zip(result.objects, logits, strict=True):
                self._put("mask", result.frame, index, np.packbits(plane > 0))
                self.counts[index] += np.count_nonzero(plane > 0)
            return first
        best = self._get("logit", result.frame, 0, np.float32)
        best = np.zeros(self.shape[1:], np.float32) if best is None else best.copy()
        labels = self.labels(result.frame).copy()
        self._count(labels, -1)
        for index, plane in sorted(zip(result.objects, logits, strict=True), key=lambda entry: entry[0]):
            higher = plane > best  # best starts at 0: below it is background
            best[higher], labels[higher] = plane[higher], self.values[index]
        self._count(labels, 1)
        self._put("label", result.frame, 0, labels)
        if len(seen) < len(self.values):  # others may come on the way back
            self._put("logit", result.frame, 0, best)
        return first

    def labels(self, frame: int) -> np.ndarray:
        """Label map [H, W] of a frame; 0 everywhere where it was not reached."""
        found = self._get("label", frame, 0, self.dtype)
        return np.zeros(self.shape[1:], self.dtype) if found is None else found

    def mask_of(self, index: int, frame: int) -> np.ndarray:
        """uint8 [H, W] of 0 and 1 of one object; 0 everywhere where it was not reached."""
        if ("mask", frame, index) not in self._places:
            return np.zeros(self.shape[1:], np.uint8)
        _, height, width = self.shape
        packed = np.frombuffer(self._read("mask", frame, index), np.uint8)
        return np.unpackbits(packed, count=height * width).reshape(height, width)

    def _count(self, labels: np.ndarray, sign: int) -> None:
        if labels.any():
            self.counts += sign * np.bincount(labels.ravel(), minlength=max(self.values) + 1)[list(self.values)]

    def _put(self, kind: str, frame: int, index: int, array: np.ndarray) -> None:
        content = self._pack.compress(np.ascontiguousarray(array).data)
        place = self._file.seek(0, 2)
        self._file.write(content)
        self._places[kind, frame, index] = (place, len(content))

    def _read(self, kind: str, frame: int, index: int) -> bytes:
        place, size = self._places[kind, frame, index]
        self._file.seek(place)
        return self._unpack.decompress(self._file.read(size))

    def _get(self, kind: str, frame: int, index: int, dtype: np.dtype | type) -> np.ndarray | None:
        if (kind, frame, index) not in self._places:
            return None
        return np.frombuffer(self._read(kind, frame, index), dtype).reshape(self.shape[1:])


@contextmanager
def open_spool(shape: tuple[int, int, int], values: tuple[int, ...], separate: bool) -> Iterator[Spool]:
    """A spool in a temporary file that is gone afterwards, whatever happens."""
    with tempfile.TemporaryFile(prefix="medsam2-") as file:
        yield Spool(shape, values, separate, file)
