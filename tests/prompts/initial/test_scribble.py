"""Scribbles: inside the object, along it, smooth, and different each time."""

from __future__ import annotations

import torch
from drawn_masks import random_masks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medsam2.prompts.initial import CURVE_STEPS, random_curves
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import PromptSettings, ScribbleSettings
from medsam2.prompts.simulate import initial_prompts


def scribbles(masks: Tensor, recipe: PromptSettings, seed: int = 0) -> Tensor:
    prompts = initial_prompts(masks, "scribble", torch.arange(len(masks)) + seed, 0, recipe)
    assert prompts.points is not None and prompts.labels is not None and (prompts.labels == 1).all()
    return prompts.points


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 2.0), st.floats(0, 2))
def test_a_scribble_stays_in_the_object(seed: int, length: float, bend: float) -> None:
    masks = random_masks(seed)
    points = scribbles(masks, PromptSettings(scribble=ScribbleSettings(length=length, bend=bend)), seed)
    assert torch.equal(points, points.round())
    assert all(mask[y, x] for mask, line in zip(masks, points, strict=True) for x, y in line.long().tolist())


def test_a_scribble_follows_a_long_structure() -> None:
    masks = torch.zeros(200, 64, 64, dtype=torch.bool)
    masks[:, 30:35, 4:60] = True
    points = scribbles(masks, PromptSettings())
    reach = points[..., 0].amax(1) - points[..., 0].amin(1)
    assert reach.median() > 20  # a straight crossing of the five rows would reach five
    assert len(torch.unique(points.flatten(1), dim=0)) > 190


def test_a_scribble_does_not_jump_to_another_part() -> None:
    masks = torch.zeros(100, 64, 64, dtype=torch.bool)
    masks[:, 10:54, 8:28] = True
    masks[:, 10:54, 34:54] = True
    points = scribbles(masks, PromptSettings(scribble=ScribbleSettings(length=1.0)))
    left = points[..., 0] < 31
    assert (left.all(1) | ~left.any(1)).all() and left.any() and not left.all()


def test_curves_turn_smoothly_and_straight_ones_not_at_all() -> None:
    scene = Scene(random_masks(3, size=64), torch.arange(6), 0)
    for bend, most in ((0.0, 1e-3), (0.6, 0.35)):
        steps = random_curves(scene, ScribbleSettings(bend=bend)).diff(dim=2)
        turns = torch.nn.functional.cosine_similarity(steps[:, :, 1:], steps[:, :, :-1], dim=-1).clamp(-1, 1).acos()
        assert turns.max() < most
    assert steps.shape[2] == 2 * CURVE_STEPS
