"""Regions: growing and depth against what they are defined by, and lookups at the border."""

from __future__ import annotations

import torch
from drawn_masks import random_masks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import avg_pool2d, max_pool2d

from medsam2.prompts.regions import DEPTH_KERNEL_PIXELS, _depth, grow, lookup, row_ends


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 40))
def test_grown_masks_are_those_of_a_moving_maximum(seed: int, pixels: int) -> None:
    masks = random_masks(seed) & (random_masks(seed + 1) | random_masks(seed + 2))
    masks[0] = False
    values = masks[:, None].float()
    for _ in range(pixels):
        values = max_pool2d(values, 3, 1, 1)
    assert torch.equal(grow(masks, pixels), values[:, 0] > 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_depth_is_the_twice_averaged_neighbourhood_also_at_the_border(seed: int) -> None:
    masks = random_masks(seed)
    averaged = masks[:, None].double()
    for _ in range(2):
        averaged = avg_pool2d(averaged, DEPTH_KERNEL_PIXELS, 1, DEPTH_KERNEL_PIXELS // 2)
    index = torch.arange(masks[0].numel()).expand(len(masks), -1)
    torch.testing.assert_close(_depth(masks, index).double() / DEPTH_KERNEL_PIXELS**4, averaged.flatten(1))


def test_lookup_takes_the_nearest_pixel_and_nothing_outside() -> None:
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, 7, 7] = masks[0, 2, 3] = True
    points = torch.tensor([[[3.4, 2.4], [2.6, 1.6], [3.6, 2.0], [7.4, 7.4], [8.0, 7.0], [-1.0, 0.0], [7.0, 63.0]]])
    assert lookup(masks, points).tolist() == [[True, True, False, True, False, False, False]]


def test_row_ends_hold_the_outermost_pixels_of_each_row() -> None:
    masks = torch.zeros(1, 4, 6, dtype=torch.bool)
    masks[0, 1, 2:5] = masks[0, 3, 0] = True
    points, valid = row_ends(masks)
    assert points[valid].tolist() == [[2, 1], [0, 3], [4, 1], [0, 3]]
