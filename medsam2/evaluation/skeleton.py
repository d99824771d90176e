"""Centre lines of bool masks in 2D and 3D by thinning that keeps their topology.

As Lee, Kashyap and Chu (CVGIP 56, 1994) do, voxels are taken off from one side after the other (up, down, left ...)
as long as they are simple, i.e. taking one off neither joins, splits, opens nor closes anything, and were not the end
of a line when the side's turn came. Simple is decided by the two numbers of Bertrand and Malandain (Pattern
Recognition Letters 15, 1994): one object component among the 26 neighbours, and one background component among the 18
that touches a face.

Voxels of one side are taken off in 8 (4) groups by the parity of their coordinates: no two of a group are neighbours,
so that all of a group can be judged and taken off at once, with array operations.

Legend: P candidate voxels, D dimensions.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np


def skeleton(mask: np.ndarray) -> np.ndarray:
    """Centre lines of a bool array [H, W] or [T, H, W]: bool of the same shape, one voxel thin, same topology."""
    shape = tuple(size + 2 for size in mask.shape)
    kept = np.pad(mask, 1).ravel()
    strides = np.array([int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))])
    steps = _offsets(mask.ndim) @ strides
    sides = [sign * stride for stride in strides for sign in (-1, 1)]
    places = np.flatnonzero(kept)
    parity = np.array(np.unravel_index(places, shape)).T % 2 @ (1 << np.arange(mask.ndim))
    changed = True
    while changed:
        changed = False
        for side in sides:
            alive = kept[places]
            places, parity = places[alive], parity[alive]
            border = ~kept[places + side]
            candidates, groups = places[border], parity[border]
            around = kept[candidates[:, None] + steps]
            free = (around.sum(1) > 1) & _simple(around, mask.ndim)  # the ends of lines stay
            candidates, groups = candidates[free], groups[free]
            for group in np.unique(groups):
                chosen = candidates[groups == group]
                taken = chosen[_simple(kept[chosen[:, None] + steps], mask.ndim)]
                kept[taken] = False
                changed |= len(taken) > 0
    return kept.reshape(shape)[(slice(1, -1),) * mask.ndim]


@lru_cache(maxsize=2)
def _offsets(dimensions: int) -> np.ndarray:
    """The 8 (26) neighbours of a voxel as steps: int [K, D]."""
    return np.array([step for step in itertools.product((-1, 0, 1), repeat=dimensions) if any(step)])


@lru_cache(maxsize=2)
def _adjacency(dimensions: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which neighbours of a voxel touch one another, float [K, K]: as object, as background; and the faces, bool [K].

    The object is joined over corners; the background over faces, and in 3D without the 8 corners of the cube.
    """
    offsets = _offsets(dimensions)
    apart = np.abs(offsets[:, None] - offsets[None])
    length = np.abs(offsets).sum(1)
    near = length < 3
    by_face = (apart.sum(-1) == 1) & near[:, None] & near[None]
    return (apart.max(-1) <= 1).astype(np.float32), by_face.astype(np.float32), length == 1


def _simple(neighbours: np.ndarray, dimensions: int) -> np.ndarray:
    """Which voxels are simple: bool [P], from their neighbours bool [P, K]."""
    as_object, as_background, face = _adjacency(dimensions)
    packed = np.packbits(neighbours, axis=1)
    codes = np.pad(packed, ((0, 0), (0, 4 - packed.shape[1]))).view(np.uint32)[:, 0]
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)  # few patterns, many voxels
    own = neighbours[first]
    empty = ~own & (face | as_background.any(1))
    one_object = own.any(1) & (_fill(own, own, as_object) == own).all(1)
    one_background = (~(empty & face) | _fill(empty, empty & face, as_background)).all(1)
    return (one_object & one_background)[inverse]


def _fill(room: np.ndarray, seeds: np.ndarray, adjacency: np.ndarray) -> np.ndarray:
    """What is reached within `room` from the first of the `seeds` of each row: bool [P, K]."""
    reached = np.zeros_like(room)
    rows = np.flatnonzero(seeds.any(1))
    reached[rows, seeds[rows].argmax(1)] = True
    while True:
        grown = room & ((reached @ adjacency > 0) | reached)
        if (grown == reached).all():
            return reached
        reached = grown
