"""Objects that prompts are simulated for in the tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

SIZE = 32


def random_masks(seed: int, count: int = 6, size: int = SIZE) -> Tensor:
    """Bool [N, size, size]: smooth blobs, often of several parts, and never empty."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 1, 4, 4, generator=generator)
    masks = interpolate(low, (size, size), mode="bilinear")[:, 0] > 0.5
    masks[:, size // 2, size // 2] = True
    return masks
