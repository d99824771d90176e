"""Masks of a clip's objects as bits: an eighth of the memory to write, to send between processes and to the device.

Legend: n objects of a clip, G planes of eight objects, T frames, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

EACH = 8  # objects of a plane


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
