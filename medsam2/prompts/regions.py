"""Points and boxes of regions, for all objects at once and without copying anything from the device to the host.

Legend: N objects, S side of the region's grid, P points.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEPTH_KERNEL_PIXELS = 9


def tight_boxes(masks: Tensor) -> Tensor:
    """Return boxes float [N, 4] of masks bool [N, S, S]: (x0, y0, x1, y1), the indices of the outermost pixels."""
    rows, columns = masks.any(2), masks.any(1)
    first, last = zip(*(_ends(line) for line in (columns, rows)), strict=True)
    return torch.stack([*first, *last], 1).float()


def _ends(line: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the last True along the last axis of bool [..., S]; 0 and S - 1 if there is none."""
    size = line.shape[-1]
    return line.float().argmax(-1), size - 1 - line.flip(-1).float().argmax(-1)


def row_ends(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the leftmost and rightmost pixel of each row: points float [N, 2 S, 2] and their validity [N, 2 S].

    The points of rows without a pixel are invalid. The convex hull of a mask is that of its valid points.
    """
    first, last = _ends(masks)
    y = torch.arange(masks.shape[1], device=masks.device).expand_as(first)
    points = torch.cat([torch.stack([first, y], -1), torch.stack([last, y], -1)], 1)
    return points.float(), masks.any(2).repeat(1, 2)


def click_inside(regions: Tensor, numbers: Tensor) -> Tensor:
    """Draw a point [N, 2] (x, y) in each region bool [N, S, S]: the deepest of as many draws as there are numbers."""
    return points_inside(regions, numbers, numbers.shape[1])[:, 0]


def points_inside(regions: Tensor, numbers: Tensor, candidates: int = 1) -> Tensor:
    """Draw points float [N, P, 2] (x, y) in regions: each the deepest of `candidates` uniform draws.

    Depth imitates people, who click well inside: it is the share of the region in the 9 x 9 neighbourhood, averaged
    twice. The point of an empty region is the last pixel.

    Args:
        regions: bool [N, S, S]. numbers: in [0, 1), float [N, P * candidates]. candidates: draws per point.
    """
    size, number = regions.shape[-1], len(regions)
    flat = regions.flatten(1)
    cumulative = flat.cumsum(1, dtype=torch.int32).float()  # Exact below 2 ** 24, in any order of summation.
    index = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True).clamp(max=flat.shape[1] - 1)
    if candidates > 1:
        best = _depth(regions, index).reshape(number, -1, candidates).argmax(2, keepdim=True)
        index = index.reshape(number, -1, candidates).gather(2, best)[:, :, 0]
    return torch.stack([index % size, torch.div(index, size, rounding_mode="floor")], -1).float()


def _depth(regions: Tensor, index: Tensor) -> Tensor:
    """Return the depth of the pixels `index` [N, P] (row * S + column): int64 [N, P], at most 81 * 81.

    Averaging twice over 9 pixels is a weighted sum over 17. A weight is the number of pixels, inside of the picture,
    that are within 4 of both ends.
    """
    size, reach = regions.shape[-1], DEPTH_KERNEL_PIXELS // 2
    offsets = torch.arange(-2 * reach, 2 * reach + 1, device=index.device)
    coordinates, weights = [], []
    for centre in (torch.div(index, size, rounding_mode="floor")[..., None], (index % size)[..., None]):
        neighbour = centre + offsets
        first = torch.maximum(neighbour, centre) - reach
        last = torch.minimum(neighbour, centre) + reach
        count = last.clamp(max=size - 1) - first.clamp(min=0) + 1
        weights.append(torch.where((neighbour >= 0) & (neighbour < size), count, 0))
        coordinates.append(neighbour.clamp(0, size - 1))
    pixels = coordinates[0][..., :, None] * size + coordinates[1][..., None, :]
    inside = regions.flatten(1).gather(1, pixels.flatten(1)).reshape(pixels.shape)
    return (inside * weights[0][..., :, None] * weights[1][..., None, :]).sum((-2, -1))


def lookup(masks: Tensor, points: Tensor) -> Tensor:
    """Return whether the pixel nearest to each point [N, ..., 2] is in the mask [N, S, S]: bool [N, ...].

    Points outside of the image are not in the mask.
    """
    size = masks.shape[-1]
    x, y = points.round().long().unbind(-1)
    within = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    index = (y * size + x).clamp(0, size * size - 1)
    return masks.flatten(1).gather(1, index.flatten(1)).reshape(index.shape) & within


def grow(masks: Tensor, pixels: int) -> Tensor:
    """Dilate masks bool [N, S, S] by a square of 2 * `pixels` + 1, at a cost that does not depend on `pixels`."""
    return _spread(_spread(masks, pixels, 1), pixels, 2)


def _spread(masks: Tensor, pixels: int, axis: int) -> Tensor:
    """Return whether there is a True within `pixels` along an axis: the cumulative sum increases in that range."""
    count = masks.cumsum(axis, dtype=torch.int32)
    index = torch.arange(masks.shape[axis], device=masks.device)
    before = index - pixels - 1
    shape = [-1 if dimension == axis else 1 for dimension in range(masks.ndim)]
    upper = count.index_select(axis, (index + pixels).clamp(max=len(index) - 1))
    lower = count.index_select(axis, before.clamp(min=0)) * (before >= 0).reshape(shape)
    return upper > lower
