"""Boxes: what each way of drawing them imprecisely does, against its definition."""

from __future__ import annotations

import torch
from drawn_masks import random_masks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medsam2.prompts.initial import jittered_boxes
from medsam2.prompts.regions import tight_boxes
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import BoxSettings

COUNT = 6000
TIGHT = torch.tensor([60.0, 100.0, 99.0, 159.0])  # sides 39 and 59


def drawn(limit: float = 20, **numbers: float | str) -> Tensor:
    """Many boxes of one object in a picture of 256 pixels: [COUNT, 4], relative to the tight one."""
    masks = torch.zeros(1, 256, 256, dtype=torch.bool)
    masks[0, 100:160, 60:100] = True
    recipe = BoxSettings.model_validate({"jitter": 0.0, **numbers})
    assert torch.equal(tight_boxes(masks)[0], TIGHT)
    return jittered_boxes(Scene(masks.expand(COUNT, -1, -1), torch.arange(COUNT), 0), recipe, limit) - TIGHT


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 20))
def test_without_jitter_a_box_contains_its_object(seed: int, grow: float) -> None:
    masks = random_masks(seed)
    recipe = BoxSettings(jitter=0, grow=grow)
    boxes = jittered_boxes(Scene(masks, torch.arange(len(masks)) + seed, 0), recipe)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.tolist(), strict=True):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        assert x0 <= columns.min() and columns.max() <= x1 and y0 <= rows.min() and rows.max() <= y1


def test_uniform_jitter_fills_a_tenth_of_the_side_and_no_more() -> None:
    moved = drawn(jitter=0.1, jitter_law="uniform")
    most = torch.tensor([3.9, 5.9, 3.9, 5.9])
    assert (moved.abs() <= most + 1e-3).all() and (moved.abs().amax(0) > 0.98 * most).all()
    assert torch.allclose(moved.std(0), most / 3**0.5, rtol=0.05)


def test_a_limit_scales_the_uniform_law_and_cuts_the_normal_one() -> None:
    uniform = drawn(limit=10, jitter=0.5, jitter_law="uniform")
    assert (uniform.abs() == 10).float().mean() < 0.01 and torch.allclose(
        uniform.std(0), torch.tensor(10 / 3**0.5), rtol=0.05
    )
    normal = drawn(limit=10, jitter=0.5, jitter_law="normal")
    assert (normal.abs() == 10).float().mean() > 0.5


def test_scaled_boxes_keep_their_centre_and_have_the_stated_spread() -> None:
    moved = drawn(scale=0.1)
    assert torch.allclose(moved[:, :2], -moved[:, 2:], atol=1e-3)
    sides = (moved[:, 2:] - moved[:, :2]) / (TIGHT[2:] - TIGHT[:2])
    assert torch.allclose(sides.std(0), torch.tensor(0.1), rtol=0.05) and sides.mean(0).abs().max() < 0.005
    assert abs(float(torch.corrcoef(sides.T)[0, 1])) < 0.05


def test_grown_boxes_move_each_side_outwards_by_up_to_the_stated_pixels() -> None:
    moved = drawn(grow=5)
    outwards = moved * torch.tensor([-1, -1, 1, 1])
    assert outwards.min() >= 0 and outwards.max() <= 5 and outwards.amax(0).min() > 4.9
    assert torch.allclose(outwards.mean(0), torch.tensor(2.5), atol=0.1)
    assert (torch.corrcoef(outwards.T) - torch.eye(4)).abs().max() < 0.06
