"""Points and boxes of regions, for all objects at once and without reading anything back to the host.

Legend: N objects, S side of the region's grid, P points.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEPTH_KERNEL = 9  # pixels


def tight_boxes(masks: Tensor) -> Tensor:
    """Boxes [N, 4] of masks bool [N, S, S]: (x0, y0, x1, y1), pixel indices of the outermost pixels, float."""
    rows, columns = masks.any(2), masks.any(1)
    first, last = zip(*(_ends(line) for line in (columns, rows)), strict=True)
    return torch.stack([*first, *last], 1).float()


def _ends(line: Tensor) -> tuple[Tensor, Tensor]:
    """First and last True along the last axis of bool [..., S]; (0, S - 1) where there is none."""
    size = line.shape[-1]
    return line.float().argmax(-1), size - 1 - line.flip(-1).float().argmax(-1)


def row_ends(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Leftmost and rightmost pixel of each row: points float [N, 2 S, 2] and whether they are in the mask [N, 2 S].

    The convex hull of a mask is that of these points.
    """
    first, last = _ends(masks)
    y = torch.arange(masks.shape[1], device=masks.device).expand_as(first)
    points = torch.cat([torch.stack([first, y], -1), torch.stack([last, y], -1)], 1)
    return points.float(), masks.any(2).repeat(1, 2)


def click_inside(regions: Tensor, numbers: Tensor) -> Tensor:
    """One point [N, 2] (x, y) in each region bool [N, S, S]; arguments as in `points_inside`, all draws for it."""
    return points_inside(regions, numbers, numbers.shape[1])[:, 0]


def points_inside(regions: Tensor, numbers: Tensor, candidates: int = 1) -> Tensor:
    """Points float [N, P, 2] (x, y), each drawn uniformly in the region or the deepest of several such draws.

    Depth is the share of a 9 x 9 neighbourhood, twice averaged, that lies in the region: people click well inside.
    An empty region gives its last pixel.

    Args:
        regions: bool [N, S, S]. numbers: in [0, 1), float [N, P * candidates]. candidates: draws for each point.
    """
    size, number = regions.shape[-1], len(regions)
    flat = regions.flatten(1)
    cumulative = flat.cumsum(1, dtype=torch.int32).float()  # exact below 2 ** 24; integers add up in any order
    index = torch.searchsorted(cumulative, numbers * cumulative[:, -1:], right=True).clamp(max=flat.shape[1] - 1)
    if candidates > 1:
        best = _depth(regions, index).reshape(number, -1, candidates).argmax(2, keepdim=True)
        index = index.reshape(number, -1, candidates).gather(2, best)[:, :, 0]
    return torch.stack([index % size, torch.div(index, size, rounding_mode="floor")], -1).float()


def _depth(regions: Tensor, index: Tensor) -> Tensor:
    """How much of their 9 x 9 neighbourhoods, twice averaged, lies in the region: int64 [N, P], 81 * 81 at most.

    Only the neighbourhoods of the pixels `index` [N, P] (row * S + column) are looked at: what is twice averaged over
    9 pixels is a sum over 17, weighted by the number of ways from one to the other that stay in the picture.
    """
    size, reach = regions.shape[-1], DEPTH_KERNEL // 2
    offsets = torch.arange(-2 * reach, 2 * reach + 1, device=index.device)
    places, weights = [], []
    for centre in (torch.div(index, size, rounding_mode="floor")[..., None], (index % size)[..., None]):
        place = centre + offsets
        first = torch.maximum(place, centre) - reach
        last = torch.minimum(place, centre) + reach
        ways = last.clamp(max=size - 1) - first.clamp(min=0) + 1
        weights.append(torch.where((place >= 0) & (place < size), ways, 0))
        places.append(place.clamp(0, size - 1))
    pixels = places[0][..., :, None] * size + places[1][..., None, :]
    inside = regions.flatten(1).gather(1, pixels.flatten(1)).reshape(pixels.shape)
    return (inside * weights[0][..., :, None] * weights[1][..., None, :]).sum((-2, -1))


def lookup(masks: Tensor, points: Tensor) -> Tensor:
    """Whether the pixel nearest to each point [N, ..., 2] is in the mask [N, S, S]: bool [N, ...]; False outside."""
    size = masks.shape[-1]
    x, y = points.round().long().unbind(-1)
    within = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    index = (y * size + x).clamp(0, size * size - 1)
    return masks.flatten(1).gather(1, index.flatten(1)).reshape(index.shape) & within


def grow(masks: Tensor, pixels: int) -> Tensor:
    """Masks bool [N, S, S] grown by a square of `pixels` on every side, at a cost that does not depend on `pixels`."""
    return _spread(_spread(masks, pixels, 1), pixels, 2)


def _spread(masks: Tensor, pixels: int, axis: int) -> Tensor:
    """Whether there is a True within `pixels` along an axis: the running count rises between both ends."""
    count = masks.cumsum(axis, dtype=torch.int32)
    place = torch.arange(masks.shape[axis], device=masks.device)
    before = place - pixels - 1
    shape = [-1 if number == axis else 1 for number in range(masks.ndim)]
    upper = count.index_select(axis, (place + pixels).clamp(max=len(place) - 1))
    lower = count.index_select(axis, before.clamp(min=0)) * (before >= 0).reshape(shape)
    return upper > lower
