"""Several points: positive ones inside, negative ones near the object or on its neighbours."""

from __future__ import annotations

import torch
from drawn_masks import random_masks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medsam2.prompts.kinds import NEGATIVE, PADDING, POSITIVE
from medsam2.prompts.scene import other_objects
from medsam2.prompts.settings import PointSettings, PromptSettings
from medsam2.prompts.simulate import initial_prompts

RECIPE = PromptSettings(points=PointSettings(positives=(2, 4), negatives=(1, 3)))


def simulate(masks: Tensor, seeds: Tensor, others: Tensor | None = None) -> tuple[Tensor, Tensor]:
    prompts = initial_prompts(masks, "points", seeds, 0, RECIPE, others)
    assert prompts.points is not None and prompts.labels is not None
    return prompts.points, prompts.labels


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_positives_lie_on_the_object_and_negatives_off_it(seed: int) -> None:
    masks = random_masks(seed)
    others = other_objects(masks, torch.zeros(6, dtype=torch.int64), 1)
    points, labels = simulate(masks, torch.arange(6) + seed, others)
    for mask, places, signs in zip(masks, points.long().tolist(), labels.tolist(), strict=True):
        for (x, y), sign in zip(places, signs, strict=True):
            assert sign == PADDING or bool(mask[y, x]) == (sign == POSITIVE)


def two_squares() -> Tensor:
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 10:26, 10:26] = True
    masks[1, 40:60, 44:60] = True
    return masks


def test_every_object_draws_its_own_number_of_points() -> None:
    masks = two_squares()[:1].expand(900, -1, -1)
    _, labels = simulate(masks, torch.arange(900))
    positives = torch.bincount((labels == POSITIVE).sum(1), minlength=5) / 900
    negatives = torch.bincount((labels == NEGATIVE).sum(1), minlength=4) / 900
    assert torch.allclose(positives, torch.tensor([0, 0, 1, 1, 1]) / 3, atol=0.06)
    assert torch.allclose(negatives, torch.tensor([0, 1, 1, 1]) / 3, atol=0.06)


def test_negatives_near_an_object_keep_a_gap_and_stay_in_the_band() -> None:
    points, labels = simulate(two_squares()[:1].expand(500, -1, -1), torch.arange(500))
    places = points[labels == NEGATIVE]
    reach = torch.maximum(10 - places, places - 25).amax(1)
    assert reach.min() > 2 and reach.max() <= 2 + round(0.08 * 64)


def test_negatives_lie_on_the_neighbour_as_often_as_the_recipe_says() -> None:
    masks = two_squares().repeat(500, 1, 1)
    others = other_objects(masks, torch.arange(1000) // 2, 500)
    points, labels = simulate(masks, torch.arange(1000), others)
    on_other = torch.stack(
        [others[n, y.long(), x.long()] for n, row in enumerate(points) for x, y in row[labels[n] == NEGATIVE]]
    )
    assert abs(float(on_other.float().mean()) - 0.5) < 0.05


def test_an_object_that_fills_the_picture_has_no_room_for_negatives() -> None:
    _, labels = simulate(torch.ones(1, 32, 32, dtype=torch.bool), torch.arange(1))
    assert (labels == NEGATIVE).sum() == 0 and (labels == POSITIVE).sum() >= 2


def test_other_objects_are_those_of_the_same_clip_alone() -> None:
    masks = random_masks(5)
    owners = torch.tensor([0, 0, 1, 1, 1, 3])  # clip 2 has no object
    others = other_objects(masks, owners, 4)
    for n in range(6):
        neighbours = [masks[k] for k in range(6) if k != n and owners[k] == owners[n]]
        expected = torch.stack(neighbours).any(0) if neighbours else torch.zeros_like(masks[0])
        assert torch.equal(others[n], expected)
