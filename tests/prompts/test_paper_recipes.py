"""configs/prompts: each file has the numbers of its paper, and simulates what the paper's code simulates."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor

from medsam2.config import compose, configs_dir, validate
from medsam2.prompts.initial import INITIAL_KINDS, jittered_boxes
from medsam2.prompts.randomness import Draws
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import PromptSettings
from medsam2.prompts.simulate import PromptPlan, correction_click, initial_prompts, plan_prompts
from medsam2.training.settings import TrainSettings

STEPS, FRAMES, COUNT = 1500, 8, 3000
SHARES = {
    "sam2": {"mask": 0.5, "box": 0.25, "click": 0.25},
    "medsam2": {"mask": 0.5, "box": 0.5},
    "biosam2": {"box": 0.5, "click": 0.5},
    "surgsam2": {"mask": 0.5, "box": 0.25, "click": 0.25},
    "ma2024": {"box": 1.0},
    "recist": {"recist": 0.5, "recist_box": 0.5},
    "scribble": {"scribble": 0.5, "box": 0.25, "click": 0.25},
    "interactive": {"mask": 0.1, "dense": 0.1, "box": 0.45, "click": 0.35},
}


def recipe(name: str) -> PromptSettings:
    config = compose("train", [f"prompts={name}", "data.shards=shards", "output=run"])
    return validate(TrainSettings, config, name).prompts


def plans(name: str) -> list[PromptPlan]:
    settings = recipe(name)
    return [plan_prompts(settings, Draws(0, step), FRAMES) for step in range(STEPS)]


def objects() -> Tensor:
    """One object many times: bool [COUNT, 96, 96], a rectangle of 60 x 20 pixels."""
    masks = torch.zeros(1, 96, 96, dtype=torch.bool)
    masks[0, 40:60, 20:80] = True
    return masks.expand(COUNT, -1, -1)


def test_every_recipe_is_tested() -> None:
    assert set(SHARES) == {path.stem for path in (configs_dir() / "prompts").glob("*.yaml")}


def test_the_defaults_of_the_settings_are_sam_2s_recipe() -> None:
    sam2 = recipe("sam2")
    used = {name: weight for name, weight in sam2.kinds.items() if weight}
    assert PromptSettings() == sam2.model_copy(update={"kinds": used})
    assert set(sam2.kinds) == set(INITIAL_KINDS), "every kind can be given a weight on the command line"


@pytest.mark.parametrize("name", SHARES)
def test_kinds_come_as_often_as_the_paper_says(name: str) -> None:
    counts = Counter(plan.kind for plan in plans(name))
    assert set(counts) == set(SHARES[name])
    for kind, share in SHARES[name].items():
        assert abs(counts[kind] / STEPS - share) < 0.04, kind


@pytest.mark.parametrize("name", ["sam2", "medsam2", "surgsam2"])
def test_one_or_two_frames_are_prompted_and_corrected_seven_times(name: str) -> None:
    prompt_plans = plans(name)
    prompted = Counter(len(plan.conditioning) for plan in prompt_plans)
    assert set(prompted) == {1, 2} and abs(prompted[1] / STEPS - 0.5) < 0.04
    corrected = Counter(len(plan.corrected) for plan in prompt_plans if plan.kind != "mask")
    # two of two prompted frames, or of one prompted frame one or two at even odds
    assert set(corrected) == {1, 2} and abs(corrected[1] / corrected.total() - 0.25) < 0.05
    assert all(plan.corrections == 7 for plan in prompt_plans)
    assert recipe(name).from_truth == 0.1 and recipe(name).corrected_as_conditioning


@pytest.mark.parametrize("name", ["biosam2", "ma2024"])
def test_the_recipes_without_corrections_prompt_one_frame_and_correct_none(name: str) -> None:
    assert {(plan.conditioning, plan.corrected) for plan in plans(name)} == {((0,), ())}


@pytest.mark.parametrize("name", ["sam2", "medsam2"])
def test_boxes_are_distributed_as_in_metas_code(name: str) -> None:
    from sam2.modeling.sam2_utils import sample_box_points

    torch.manual_seed(0)
    scene = Scene(objects(), torch.arange(COUNT), 0)
    theirs, _ = sample_box_points(objects()[:, None])
    ours = jittered_boxes(scene, recipe(name).box)
    for side in range(4):
        assert ks_2samp(theirs.reshape(-1, 4)[:, side], ours[:, side]).pvalue > 0.001


def test_clicks_and_corrections_are_distributed_as_in_metas_code() -> None:
    from sam2.modeling.sam2_utils import sample_random_points_from_errors

    torch.manual_seed(0)
    truth = objects()
    predicted = truth.roll((9, 13), (1, 2))
    settings = recipe("sam2").model_copy(update={"from_truth": 0.0})
    click = initial_prompts(truth, "click", torch.arange(COUNT), 0, settings)
    assert click.points is not None and click.labels is not None
    corrections = correction_click(predicted, truth, torch.arange(COUNT), 0, 0, settings)
    for guess, (points, labels) in ((None, (click.points, click.labels)), (predicted[:, None], corrections)):
        their_points, their_labels = sample_random_points_from_errors(truth[:, None], guess)
        assert abs(float(labels.float().mean() - their_labels.float().mean())) < 0.04
        for axis in range(2):
            assert ks_2samp(their_points[:, 0, axis], points[:, 0, axis]).pvalue > 0.001


def test_biosam2_scales_the_sides_and_ma2024_moves_them_outwards() -> None:
    scene = Scene(objects(), torch.arange(COUNT), 0)
    tight = torch.tensor([20.0, 40.0, 79.0, 59.0])
    scaled = jittered_boxes(scene, recipe("biosam2").box) - tight
    sides = (scaled[:, 2:] - scaled[:, :2]) / (tight[2:] - tight[:2])
    assert torch.allclose(sides.std(0), torch.tensor(0.1), rtol=0.08)
    grown = jittered_boxes(scene, recipe("ma2024").box) - tight
    outwards = grown * torch.tensor([-1, -1, 1, 1]) * 256 / 96
    assert outwards.min() >= 0 and 4.9 < outwards.max() <= 5
