"""Convert uint8 frames to the model's input: resize, and normalise with ImageNet's constants.

Legend: F frames, C channels (1 grey or 3 RGB), H and W stored pixels, S the side of the model's input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def standardise(frames: Tensor) -> Tensor:
    """Normalise float frames [..., C, S, S] in 0..1, C 1 or 3, to RGB [..., 3, S, S] with ImageNet's constants."""
    mean = torch.tensor(IMAGENET_MEAN, device=frames.device, dtype=frames.dtype)[:, None, None]
    std = torch.tensor(IMAGENET_STD, device=frames.device, dtype=frames.dtype)[:, None, None]
    return (frames - mean) / std


def resize(frames: Tensor, size: int) -> Tensor:
    """Resize uint8 [F, C, H, W] to float [F, C, S, S] in 0..1, stretched to a square as in SAM 2, with antialiasing."""
    values = frames.to(torch.float32) / 255.0
    if values.shape[-2:] == (size, size):
        return values
    return F.interpolate(values, (size, size), mode="bilinear", antialias=True, align_corners=False).clamp_(0.0, 1.0)


def normalise(frames: Tensor, size: int) -> Tensor:
    """Convert uint8 [F, C, H, W], C 1 or 3, to the model's input, float [F, 3, S, S]."""
    return standardise(resize(frames, size))
