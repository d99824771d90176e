"""Simulated prompts obey the recipe: boxes are tight and jittered within limits, clicks hit what they should."""

from typing import Literal

import pytest
import torch
from drawn_masks import SIZE, random_masks
from hypothesis import given, settings
from hypothesis import strategies as st

from medsam2.prompts.initial import jittered_boxes
from medsam2.prompts.kinds import Prompts
from medsam2.prompts.randomness import Draws, uniform
from medsam2.prompts.regions import click_inside, tight_boxes
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import BoxSettings, PromptSettings
from medsam2.prompts.simulate import PromptPlan, correction_click, dense_prompts, initial_prompts, plan_prompts


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_tight_box_touches_the_mask_on_every_side(seed: int) -> None:
    masks = random_masks(seed)
    for mask, box in zip(masks, tight_boxes(masks), strict=True):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        assert box.tolist() == [columns.min(), rows.min(), columns.max(), rows.max()]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 0.5), st.floats(0, 5), st.sampled_from(["normal", "uniform"]))
def test_jitter_stays_within_its_limit_and_the_image(
    seed: int, jitter: float, limit: float, law: Literal["normal", "uniform"]
) -> None:
    masks = random_masks(seed)
    scene = Scene(masks, torch.arange(len(masks)) + seed, 0)
    boxes = jittered_boxes(scene, BoxSettings(jitter=jitter, jitter_law=law), limit)
    assert ((boxes - tight_boxes(masks)).abs() <= limit + 1e-4).all()
    assert boxes.min() >= 0 and boxes.max() <= SIZE - 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 4]))
def test_click_lies_inside_its_region(seed: int, candidates: int) -> None:
    masks = random_masks(seed)
    points = click_inside(masks, uniform(torch.arange(len(masks)), seed, candidates)).long()
    assert all(mask[y, x] for mask, (x, y) in zip(masks, points.tolist(), strict=True))


def test_click_is_uniform_over_the_region() -> None:
    mask = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    mask[0, 3, 5:9] = True
    points = click_inside(mask.expand(8000, -1, -1), uniform(torch.arange(8000), 1))
    counts = torch.bincount(points[:, 0].long(), minlength=9)[5:9] / 8000
    assert torch.allclose(counts, torch.full((4,), 0.25), atol=0.02)


def test_deepest_of_many_candidates_is_near_the_middle_of_a_disk() -> None:
    grid = torch.arange(SIZE) - 15.5
    disk = (grid[None] ** 2 + grid[:, None] ** 2 < 144)[None].expand(200, -1, -1)
    far_one = (click_inside(disk, uniform(torch.arange(200), 1)) - 15.5).norm(dim=1).mean()
    far_many = (click_inside(disk, uniform(torch.arange(200), 1, 12)) - 15.5).norm(dim=1).mean()
    assert far_many < 0.6 * far_one


def test_correction_is_positive_on_what_is_missed_and_negative_on_what_is_too_much() -> None:
    truth = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    truth[:, 8:16, 8:16] = True
    predicted = truth.clone()
    predicted[0, 8:16, 8:12] = False
    predicted[1, 20:24, 20:24] = True
    recipe = PromptSettings(from_truth=0.0)
    for step in range(20):
        points, labels = correction_click(predicted, truth, torch.tensor([1, 2]), 0, step, recipe)
        assert labels[:, 0].tolist() == [1, 0]
        assert (points[0, 0] >= 8).all() and points[0, 0, 0] < 12
        assert ((points[1, 0] >= 20) & (points[1, 0] < 24)).all()


def test_no_error_gives_a_negative_click_in_the_background() -> None:
    truth = random_masks(3)
    points, labels = correction_click(truth, truth, torch.arange(len(truth)), 1, 0, PromptSettings(from_truth=0.0))
    assert (labels == 0).all()
    assert not any(mask[y, x] for mask, (x, y) in zip(truth, points[:, 0].long().tolist(), strict=True))


def test_absent_object_gets_no_box_and_a_negative_click() -> None:
    masks = random_masks(5)
    masks[2] = False
    box = initial_prompts(masks, "box", torch.arange(len(masks)), 0, PromptSettings())
    assert box.labels is not None and box.labels[2].tolist() == [-1, -1] and box.labels[0].tolist() == [2, 3]
    click = initial_prompts(masks, "click", torch.arange(len(masks)), 0, PromptSettings())
    assert click.labels is not None and click.labels[:, 0].tolist() == [1, 1, 0, 1, 1, 1]


def test_prompts_of_an_object_do_not_depend_on_the_others() -> None:
    masks, seeds = random_masks(8), torch.arange(6) * 99
    for kind in ("box", "click"):
        together = initial_prompts(masks, kind, seeds, 2, PromptSettings())
        alone = initial_prompts(masks[3:4], kind, seeds[3:4], 2, PromptSettings())
        assert together.points is not None and alone.points is not None
        assert torch.equal(together.points[3:4], alone.points)


def test_damaged_mask_still_resembles_the_mask() -> None:
    masks = random_masks(9, 40)
    _, logits = dense_prompts(masks, (16, 16), torch.arange(40), 0)
    reduced = torch.nn.functional.interpolate(masks[:, None].float(), (16, 16), mode="area") > 0.5
    overlap = ((logits > 0) & reduced).sum((1, 2, 3)) / ((logits > 0) | reduced).sum((1, 2, 3))
    assert 0.5 < overlap.mean() < 1.0
    assert (overlap < 1).any()


def test_plan_prompts_the_first_frame_and_corrects_the_conditioning_frames() -> None:
    recipe = PromptSettings(conditioning_frames=2, correction_frames=2)
    plans = [plan_prompts(recipe, Draws(0, step), 8) for step in range(300)]
    for plan in plans:
        assert plan.conditioning[0] == 0 and len(plan.conditioning) <= 2
        assert sorted(plan.order(8)) == list(range(8))
        assert plan.order(8)[: len(plan.conditioning)] == list(plan.conditioning)
        if plan.kind == "mask":
            assert plan.corrected == ()
        else:
            assert set(plan.conditioning) <= set(plan.corrected) and len(plan.corrected) <= 2
    assert {len(p.conditioning) for p in plans} == {1, 2}


def test_the_frame_that_shows_all_objects_is_prompted_first_wherever_it_stands() -> None:
    plans = [plan_prompts(PromptSettings(), Draws(0, step), 8, first=5) for step in range(300)]
    assert all(plan.conditioning[0] == 5 for plan in plans)
    assert {frame for plan in plans for frame in plan.conditioning[1:]} == {0, 1, 2, 3, 4, 6, 7}
    assert all(5 in plan.corrected for plan in plans if plan.kind not in ("mask", "dense"))


def test_frames_are_tracked_away_from_the_first_prompt_in_both_directions() -> None:
    plan = PromptPlan("box", (3, 1), (), 0)
    assert plan.order(6) == [3, 1, 4, 5, 2, 0]
    assert [frame for frame in range(6) if plan.reverse(frame)] == [0, 1, 2]
    assert PromptPlan("box", (0, 4), (), 0).order(6) == [0, 4, 1, 2, 3, 5]


def test_a_still_never_gets_a_mask_that_is_its_own_answer() -> None:
    recipe = PromptSettings(kinds={"mask": 1})
    assert {plan_prompts(recipe, Draws(0, step), 1).kind for step in range(20)} == {"dense"}


def test_stills_share_the_kinds_but_mask_unless_the_recipe_has_mask_prompts_for_them() -> None:
    never = [plan_prompts(PromptSettings(still_masks=False), Draws(0, step), 1).kind for step in range(400)]
    assert set(never) == {"box", "click"} and abs(never.count("box") / 400 - 0.5) < 0.08
    often = [plan_prompts(PromptSettings(still_masks=True), Draws(0, step), 1).kind for step in range(400)]
    assert set(often) == {"box", "click", "dense"} and abs(often.count("dense") / 400 - 0.5) < 0.08


def test_a_corrected_frame_is_a_conditioning_frame_if_the_recipe_says_so() -> None:
    plan = PromptPlan("box", (0,), (0, 2), 1)
    meta, plain = PromptSettings(corrected_as_conditioning=True), PromptSettings(corrected_as_conditioning=False)
    assert [plan.is_conditioning(t, meta) for t in range(4)] == [True, False, True, False]
    assert [plan.is_conditioning(t, plain) for t in range(4)] == [True, False, False, False]


def test_truth_draws_come_as_often_as_the_recipe_says() -> None:
    """With a prediction that misses a corner, a click elsewhere in the object can only be from the truth."""
    truth = torch.zeros(4000, 16, 16, dtype=torch.bool)
    truth[:, 4:12, 4:12] = True
    predicted = truth.clone()
    predicted[:, 4:6, 4:6] = False
    points, labels = correction_click(predicted, truth, torch.arange(4000), 0, 0, PromptSettings(from_truth=0.25))
    assert (labels == 1).all()
    elsewhere = (points[:, 0] >= 6).any(1).float().mean()
    assert abs(float(elsewhere) - 0.25 * 60 / 64) < 0.03


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"kinds.boxes: the kinds are mask, box, .*scribble. Did you mean 'box'"):
        PromptSettings(kinds={"boxes": 1})


def test_mask_prompts_leave_a_frame_to_track() -> None:
    recipe = PromptSettings(kinds={"mask": 1}, conditioning_frames=3)
    assert all(len(plan_prompts(recipe, Draws(0, step), 2).conditioning) == 1 for step in range(50))


def test_points_without_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="together"):
        Prompts(points=torch.zeros(1, 1, 2))
    with pytest.raises(ValueError, match="either"):
        Prompts()
