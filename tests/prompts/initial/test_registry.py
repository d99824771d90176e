"""Every kind of prompt: known by name, fixed shapes, nothing of an object depends on the others."""

from __future__ import annotations

import pytest
import torch
from drawn_masks import random_masks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medsam2.prompts.initial import INITIAL_KINDS, initial_kind
from medsam2.prompts.kinds import PADDING, Prompts
from medsam2.prompts.scene import other_objects
from medsam2.prompts.settings import BoxSettings, PointSettings, PromptSettings, RecistSettings
from medsam2.prompts.simulate import initial_prompts

KINDS = sorted(INITIAL_KINDS)
RECIPE = PromptSettings(click_candidates=3, box=BoxSettings(scale=0.1, grow=5), recist=RecistSettings(jitter=0.1))
OWNERS = torch.tensor([0, 0, 0, 1, 1, 1])


def simulate(kind: str, masks: Tensor, seeds: Tensor, owners: Tensor = OWNERS, frame: int = 2) -> Prompts:
    others = other_objects(masks, owners, int(owners.max()) + 1)
    return initial_prompts(masks, kind, seeds, frame, RECIPE, others)


def points(prompts: Prompts) -> tuple[Tensor, Tensor]:
    assert prompts.points is not None and prompts.labels is not None
    return prompts.points, prompts.labels


def test_a_second_kind_of_one_name_is_refused() -> None:
    with pytest.raises(RuntimeError, match="two kinds of prompt are named 'box'"):
        initial_kind(INITIAL_KINDS["box"])


def test_a_recipe_without_any_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one of box, .*scribble"):
        PromptSettings(kinds=dict.fromkeys(KINDS, 0))
    with pytest.raises(ValueError, match="Did you mean 'scribble'"):
        PromptSettings(kinds={"scrible": 1.0})
    with pytest.raises(ValueError, match="positives must be"):
        PointSettings(positives=(0, 3))
    with pytest.raises(ValueError, match="negatives must be"):
        PointSettings(negatives=(3, 1))


def test_what_checkpoints_recorded_before_the_groups_is_still_read() -> None:
    earlier = {"mask": 0.1, "box": 0.9, "box_jitter": 0.2, "negatives": [0, 2], "recist_along": 1, "corrections": 3}
    read = PromptSettings.model_validate(earlier)
    assert read.kinds == {"mask": 0.1, "box": 0.9} and read.corrections == 3
    assert read.points.negatives == (0, 2)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mask"])
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_two_batches_have_the_prompts_of_one_of_both(kind: str, seed: int) -> None:
    masks, seeds = random_masks(seed), torch.arange(6) * 7919 + seed
    whole, labels = points(simulate(kind, masks, seeds))
    for take in (slice(0, 3), slice(3, 6)):
        part, part_labels = points(simulate(kind, masks[take], seeds[take], OWNERS[take] - OWNERS[take][0]))
        torch.testing.assert_close(part, whole[take], atol=1e-4, rtol=0)
        assert torch.equal(part_labels, labels[take])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mask"])
def test_frames_and_seeds_give_other_prompts(kind: str) -> None:
    masks = random_masks(4)
    first, _ = points(simulate(kind, masks, torch.arange(6)))
    assert not torch.equal(first, points(simulate(kind, masks, torch.arange(6), frame=3))[0])
    assert not torch.equal(first, points(simulate(kind, masks, torch.arange(6) + 100))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_do_not_depend_on_what_the_objects_look_like(kind: str) -> None:
    seeds = torch.arange(6)
    masks = random_masks(1)
    plain = simulate(kind, masks, seeds)
    masks[0], masks[1], masks[2], masks[3] = False, True, False, False
    masks[2, 5, 7] = True
    masks[3, 9] = True
    odd = simulate(kind, masks, seeds)
    for name in ("points", "labels", "masks"):
        here, there = getattr(plain, name), getattr(odd, name)
        assert (here is None) == (there is None)
        assert here is None or (here.shape == there.shape and here.dtype == there.dtype)
    assert odd.points is None or (odd.points.isfinite().all() and odd.points.min() >= 0 and odd.points.max() <= 31)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mask"])
def test_an_absent_object_gets_padding_and_at_most_one_negative_click(kind: str) -> None:
    masks = random_masks(2)
    masks[1] = False
    _, labels = points(simulate(kind, masks, torch.arange(6)))
    assert set(labels[1].tolist()) <= {PADDING, 0} and int((labels[1] == 0).sum()) <= 1
    assert all((row != PADDING).any() for row in labels[[0, 2, 3, 4, 5]])
