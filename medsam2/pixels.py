"""uint8 frames to the network's input: one place for ImageNet's constants and for the plain resize.

Legend: F frames, C channels (1 grey or 3 RGB), H and W stored pixels, S the model's side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def standardise(frames: Tensor) -> Tensor:
    """Frames in 0..1, float [..., C, S, S] with C 1 or 3, to ImageNet-normalised RGB [..., 3, S, S]."""
    mean = torch.tensor(IMAGENET_MEAN, device=frames.device, dtype=frames.dtype)[:, None, None]
    std = torch.tensor(IMAGENET_STD, device=frames.device, dtype=frames.dtype)[:, None, None]
    return (frames - mean) / std


def resize(frames: Tensor, size: int) -> Tensor:
    """uint8 [F, C, H, W] to float 0..1 [F, C, S, S], stretched to the square as SAM 2 does, without aliasing."""
    values = frames.to(torch.float32) / 255.0
    if values.shape[-2:] == (size, size):
        return values
    return F.interpolate(values, (size, size), mode="bilinear", antialias=True, align_corners=False).clamp_(0.0, 1.0)


def normalise(frames: Tensor, size: int) -> Tensor:
    """uint8 [F, C, H, W] with C 1 or 3 to the model's input, float [F, 3, S, S]."""
    return standardise(resize(frames, size))
