"""Windows and pooling of tokens.

Legend: F frames, H and W grid, C channels, w side of a window, R and S windows down and across (the last ones may reach
beyond the grid).
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor


def windows(x: Tensor, side: int) -> Tensor:
    """[F, H, W, C] -> [F * R * S, w, w, C], where windows divide the grid."""
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return x.transpose(2, 3).flatten(0, 2)


def joined(parts: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `windows`: [F * R * S, w, w, C] -> [F, H, W, C]."""
    side = parts.shape[1]
    x = parts.unflatten(0, (-1, size[0] // side, size[1] // side))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def windows_beyond(x: Tensor, edge: Tensor, side: int) -> Tensor:
    """[F, H, W, C] -> [F * R * S, w, w, C]; what lies beyond the grid is `edge` [C]."""
    height, width = x.shape[1:3]
    padded = edge.to(x.dtype).expand(len(x), height + -height % side, width + -width % side, -1).clone()
    padded[:, :height, :width] = x
    return windows(padded, side)


def joined_within(parts: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `windows_beyond`, without what lies beyond: [F * R * S, w, w, C] -> [F, H, W, C]."""
    (height, width), side = size, parts.shape[1]
    return joined(parts, (height + -height % side, width + -width % side))[:, :height, :width]


def pooled(x: Tensor, stride: tuple[int, int] | None) -> Tensor:
    """The largest of each `stride` of the tokens: [F, H, W, C] -> [F, H', W', C]; no stride: the tokens themselves."""
    if not stride:
        return x
    output: Tensor = _Largest.apply(x, stride)
    return output


class _Largest(torch.autograd.Function):
    """Max-pooling that keeps its input and output, which are kept anyway, and no indices (8 bytes a number)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: tuple[int, int]) -> Tensor:
        largest = reduce(torch.maximum, _places(x, stride))
        ctx.stride = stride
        ctx.save_for_backward(x, largest)
        return largest

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """To the first of each group that is the largest."""
        (gradient,) = gradients
        x, largest = ctx.saved_tensors
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        free: Tensor | None = None
        for values, given in zip(_places(x, ctx.stride), _places(result, ctx.stride), strict=True):
            hit = values == largest
            torch.mul(gradient, hit if free is None else hit & free, out=given)
            free = ~hit if free is None else free & ~hit
        return result, None


def _places(x: Tensor, stride: tuple[int, int]) -> list[Tensor]:
    return [x[:, row :: stride[0], column :: stride[1]] for row in range(stride[0]) for column in range(stride[1])]
