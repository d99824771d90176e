"""Masks of a clip's objects as bits: an eighth of the memory to write, to send between processes and to the device.

Legend: n objects of a clip, G planes of eight objects, P label planes of a frame, T frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

OBJECTS_PER_PLANE = 8


@dataclass(frozen=True)
class PackedMasks:
    """bits: uint8 [G, T, H, W]; bit b of plane g is the mask of object 8 g + b. count: n."""

    bits: Tensor
    count: int

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


def pack_labels(planes: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """Label planes [P, H, W] to uint8 [H, W], whose bit b says where plane and value are those of pair b."""
    bits = np.zeros(planes.shape[1:], np.uint8)
    for bit, (plane, value) in enumerate(pairs):
        # a Python number keeps the comparison in the planes' own type, eight times faster
        bits |= (planes[plane] == value).view(np.uint8) << np.uint8(bit)
    return bits
