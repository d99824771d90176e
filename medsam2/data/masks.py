"""Masks of a clip's objects as bits: an eighth of the memory to write, to send between processes and to the device.

Legend: n objects of a clip, G planes of eight objects, P label planes of a frame, T frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

OBJECTS_PER_PLANE = 8
MAX_COMPARED_OBJECTS = 5
"""Up to so many objects comparing is faster than a table."""


@dataclass(frozen=True)
class PackedMasks:
    """bits: uint8 [G, T, H, W]; bit b of plane g is the mask of object 8 g + b. count: n."""

    bits: Tensor
    count: int

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        height, width = self.bits.shape[-2:]
        return int(height), int(width)

    def object(self, index: int) -> Tensor:
        """bool [T, H, W]: the mask of one object."""
        return (self.bits[index // OBJECTS_PER_PLANE] & (1 << index % OBJECTS_PER_PLANE)) != 0

    def unpack(self) -> Tensor:
        """bool [n, T, H, W]."""
        return torch.stack([self.object(index) for index in range(self.count)])

    def present(self, frame: int) -> Tensor:
        """bool [n]: which objects have a pixel on a frame."""
        on_frame = PackedMasks(self.bits[:, frame : frame + 1], self.count)
        return torch.stack([on_frame.object(index).any() for index in range(self.count)])


def num_planes(count: int) -> int:
    """G for n objects."""
    return -(-count // OBJECTS_PER_PLANE)


def labelled_rows(planes: np.ndarray) -> tuple[int, int]:
    """The first row of label planes [P, H, W] that is not all zero, and the one after the last."""
    line = planes.shape[2] * planes.dtype.itemsize
    words = planes.view(np.uint64) if line % 8 == 0 else planes  # eight pixels at a time
    rows = np.flatnonzero(words.any(axis=(0, 2)))
    return (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)


def pack_labels(planes: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Label planes [P, H, W] to uint8 [H, W], whose bit b says where plane and value are those of pair b."""
    bits = np.empty(planes.shape[1:], np.uint8)
    if len(pairs) > MAX_COMPARED_OBJECTS and planes.dtype == np.uint8 and len({plane for plane, _ in pairs}) == 1:
        table = np.zeros(256, np.uint8)
        for bit, (_, value) in enumerate(pairs):
            table[value] |= 1 << bit
        return cv2.LUT(planes[pairs[0][0]], table, dst=bits)
    # Python numbers keep the comparison in the planes' own type, eight times faster
    np.equal(planes[pairs[-1][0]], pairs[-1][1], out=bits.view(np.bool_))
    more = np.empty_like(bits)
    for plane, value in pairs[-2::-1]:
        np.equal(planes[plane], value, out=more.view(np.bool_))
        np.add(bits, bits, out=bits)
        np.bitwise_or(bits, more, out=bits)
    return bits
