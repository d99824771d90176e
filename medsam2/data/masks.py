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

EACH = 8  # objects of a plane
FEW = 5  # objects up to which comparing is faster than a table


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
        return (self.bits[index // EACH] & (1 << index % EACH)) != 0

    def unpack(self) -> Tensor:
        """bool [n, T, H, W]."""
        return torch.stack([self.object(index) for index in range(self.count)])

    def present(self, frame: int) -> Tensor:
        """bool [n]: which objects have a pixel on a frame."""
        if self.bits.device.type == "cpu":
            seen = [int(np.bitwise_or.reduce(plane[frame], axis=None)) for plane in self.bits.numpy()]
            return torch.tensor([bool(seen[i // EACH] >> i % EACH & 1) for i in range(self.count)])
        return torch.stack([self.object(index)[frame].any() for index in range(self.count)])


def planes_of(count: int) -> int:
    """G for n objects."""
    return -(-count // EACH)


def pack(masks: Tensor) -> Tensor:
    """bool [n, T, H, W] to bits uint8 [G, T, H, W]."""
    bits = masks.new_zeros((planes_of(len(masks)), *masks.shape[1:]), dtype=torch.uint8)
    for index, mask in enumerate(masks):
        bits[index // EACH] |= mask.to(torch.uint8) << index % EACH
    return bits


def labelled_rows(planes: np.ndarray) -> tuple[int, int]:
    """The first row of label planes [P, H, W] that is not all zero, and the one after the last."""
    line = planes.shape[2] * planes.dtype.itemsize
    words = planes.view(np.uint64) if line % 8 == 0 else planes  # eight pixels at a time
    rows = np.flatnonzero(words.any(axis=(0, 2)))
    return (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)


def pack_labels(planes: np.ndarray, pairs: Sequence[tuple[int, int]], out: np.ndarray, more: np.ndarray) -> None:
    """Label planes [P, H, W] to `out` uint8 [H, W], whose bit b says where plane and value are those of pair b.

    Args:
        more: memory like `out`.
    """
    if len(pairs) > FEW and planes.dtype == np.uint8 and len({plane for plane, _ in pairs}) == 1:
        table = np.zeros(256, np.uint8)
        for bit, (_, value) in enumerate(pairs):
            table[value] |= 1 << bit
        cv2.LUT(planes[pairs[0][0]], table, dst=out)
        return
    # Python numbers keep the comparison in the planes' own type, eight times faster
    np.equal(planes[pairs[-1][0]], pairs[-1][1], out=out.view(np.bool_))
    for plane, value in pairs[-2::-1]:
        np.equal(planes[plane], value, out=more.view(np.bool_))
        np.add(out, out, out=out)
        np.bitwise_or(out, more, out=out)
