"""Masks as a reader would have packed them."""

from __future__ import annotations

import torch
from torch import Tensor

from medsam2.data.batch import OBJECTS_PER_PLANE, num_planes


def pack(masks: Tensor) -> Tensor:
    """bool [n, T, H, W] to bits uint8 [G, T, H, W], eight objects to a plane."""
    bits = masks.new_zeros((num_planes(len(masks)), *masks.shape[1:]), dtype=torch.uint8)
    for index, mask in enumerate(masks):
        bits[index // OBJECTS_PER_PLANE] |= mask.to(torch.uint8) << index % OBJECTS_PER_PLANE
    return bits
