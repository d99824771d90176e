"""Windows and pooling of tokens, each one pass over memory in both directions.

Written as autograd functions where the operators of torch would copy the tokens several times: on a CPU the first touch
of fresh memory costs more than the arithmetic of these steps.

Legend: F frames, H and W grid, C channels, w side of a window, R and S windows down and across (the last ones may reach
beyond the grid).
"""

from __future__ import annotations

from collections.abc import Iterator
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
    parts: Tensor = _Beyond.apply(x, edge.to(x.dtype), side)
    return parts


def joined_within(parts: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `windows_beyond`, without what lies beyond: [F * R * S, w, w, C] -> [F, H, W, C]."""
    x: Tensor = _Within.apply(parts, size)
    return x


def pooled(x: Tensor, stride: tuple[int, int] | None) -> Tensor:
    """The largest of each `stride` of the tokens: [F, H, W, C] -> [F, H', W', C]; no stride: the tokens themselves."""
    if not stride:
        return x
    output: Tensor = _Largest.apply(x, stride)
    return output


def _tiles(size: tuple[int, int], side: int) -> Iterator[tuple[int, int, int, int]]:
    """Row and column of each window, and how many of its rows and columns are in the grid."""
    for row in range(-(-size[0] // side)):
        for column in range(-(-size[1] // side)):
            yield row, column, min(side, size[0] - row * side), min(side, size[1] - column * side)


def _scatter(x: Tensor, parts: Tensor, side: int) -> None:
    """Copy the grid x [F, H, W, C] into its windows [F, R, S, w, w, C]."""
    for row, column, high, wide in _tiles((x.shape[1], x.shape[2]), side):
        top, left = row * side, column * side
        parts[:, row, column, :high, :wide] = x[:, top : top + high, left : left + wide]


def _gather(parts: Tensor, size: tuple[int, int]) -> Tensor:
    """The grid [F, H, W, C] of the windows [F, R, S, w, w, C]."""
    side = parts.shape[3]
    x = parts.new_empty(parts.shape[0], *size, parts.shape[-1])
    for row, column, high, wide in _tiles(size, side):
        top, left = row * side, column * side
        x[:, top : top + high, left : left + wide] = parts[:, row, column, :high, :wide]
    return x


def _outside(parts: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """The parts of the windows [F, R, S, w, w, C] beyond the grid."""
    for row, column, high, wide in _tiles(size, parts.shape[3]):
        yield parts[:, row, column, high:]
        yield parts[:, row, column, :high, wide:]


class _Beyond(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, edge: Tensor, side: int) -> Tensor:
        ctx.size = size = (x.shape[1], x.shape[2])
        parts = x.new_empty(x.shape[0], -(-size[0] // side), -(-size[1] // side), side, side, x.shape[-1])
        _scatter(x, parts, side)
        for beyond in _outside(parts, size):
            beyond.copy_(edge.expand_as(beyond))
        return parts.flatten(0, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        side, size = gradient.shape[1], ctx.size
        parts = gradient.unflatten(0, (-1, -(-size[0] // side), -(-size[1] // side)))
        edge = torch.stack([beyond.flatten(0, -2).sum(0) for beyond in _outside(parts, size)]).sum(0)
        return _gather(parts, size), edge, None


class _Within(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.shape, side = parts.shape, parts.shape[1]
        return _gather(parts.unflatten(0, (-1, -(-size[0] // side), -(-size[1] // side))), size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        side, size = ctx.shape[1], (gradient.shape[1], gradient.shape[2])
        whole = gradient.new_empty(ctx.shape)
        parts = whole.unflatten(0, (-1, -(-size[0] // side), -(-size[1] // side)))
        _scatter(gradient, parts, side)
        for beyond in _outside(parts, size):
            beyond.zero_()
        return whole, None


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
