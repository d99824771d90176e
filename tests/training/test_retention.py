"""What holds a fine-tuning to its start: replay, L2, distillation, the moving average."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from small_shards import build
from torch import Tensor, nn

from medsam2.adaptation.anchors import Anchors
from medsam2.adaptation.freeze import AdaptationSettings, apply_adaptation
from medsam2.adaptation.lora import PeftSettings
from medsam2.config import compose, validate
from medsam2.data.augment.augment import AugmentedBatch
from medsam2.data.settings import DataSettings
from medsam2.errors import UserError
from medsam2.model.build import load_model
from medsam2.model.losses import LossSettings
from medsam2.model.provenance import Provenance
from medsam2.model.tracker import Decoded, TrackedFrame
from medsam2.prompts.simulate import PromptPlan
from medsam2.training.cases import TrainingData
from medsam2.training.module import FineTuner
from medsam2.training.retention import (
    EmaAverage,
    RetentionSettings,
    add_replay,
    distillation_loss,
    distilled_objects,
    divergence,
    pull_after_steps,
)
from medsam2.training.run_folder.resume import STATED, recipe, recipe_changes
from medsam2.training.settings import TrainSettings

GIVEN = ["data.shards=shards", "output=run"]


def test_presets_combine_in_one_line_and_single_values_stay_free() -> None:
    line = ["retention=[replay,distil_old,interpolation]", "retention.new=[wall]", "retention.l2=3", "ema=0.9"]
    retention = validate(TrainSettings, compose("train", [*line, "adaptation=lora_all", *GIVEN]), "it").retention
    assert (retention.replay, retention.distillation, retention.distil_on, retention.l2) == (0.5, 1, "old", 3)
    assert retention.interpolate and retention.needs_start
    replay = validate(TrainSettings, compose("train", ["retention=replay", *GIVEN]), "it").retention
    assert replay == RetentionSettings(replay=0.5)
    assert not RetentionSettings(replay=0.5, new=("a",)).needs_start, "replay holds no copy of the start"


@pytest.mark.parametrize(
    ("override", "line"), [("keep=[replay,l2]", "retention=..."), ("keep.l2=30", "retention.l2=...")]
)
def test_the_earlier_name_of_the_group_is_answered_by_the_new_one(override: str, line: str) -> None:
    with pytest.raises(UserError, match=f"the group keep is called retention now; write {line}"):
        compose("train", [override, *GIVEN])
    with pytest.raises(UserError, match="is called `retention` now"):
        validate(TrainSettings, {**compose("train", GIVEN), "keep": {"l2": 30}})


def test_a_checkpoint_that_records_the_earlier_name_is_read_and_compared() -> None:
    settings = validate(TrainSettings, compose("train", ["retention.l2=30", *GIVEN]))
    earlier = recipe(settings)
    earlier["keep"] = earlier.pop("retention")
    checkpoint = {"medsam2": {"recipe": earlier}}
    assert recipe_changes(checkpoint, settings, STATED) == []
    assert Provenance.model_validate(checkpoint["medsam2"]).recipe == recipe(settings)
    other = validate(TrainSettings, compose("train", ["retention.l2=3", *GIVEN]))
    assert recipe_changes(checkpoint, other, STATED) == [("retention.l2", 30.0, 3.0)]


# ---------------------------------------------------------------------------------------------------- replay


def data(**more: object) -> DataSettings:
    return DataSettings.model_validate({"shards": "x", **more})


def test_replay_is_a_mixture_with_its_share_of_old_data() -> None:
    assert add_replay(data(), RetentionSettings(replay=0.3, new=("wall*",))).mixture == {"wall*": 0.7, "*": 0.3}
    two = add_replay(data(), RetentionSettings(replay=0.3, old=("a", "MR"))).mixture
    assert two == {"a": 0.15, "MR": 0.15, "*": 0.7}
    assert add_replay(data(mixture={"a": 1.0}), RetentionSettings()).mixture == {"a": 1.0}


def test_the_clips_that_training_plans_have_the_share_of_replay(tmp_path: Path) -> None:
    shards = build(tmp_path / "shards")
    own = TrainSettings.model_validate(
        {"data": {"shards": shards, "workers": 0}, "output": "x", "retention": {"replay": 0.2, "old": ["e"]}}
    )
    shares = {row.source: row.share for row in TrainingData(own, 128).expected_shares()}
    assert shares == {"shards:e": pytest.approx(0.2, abs=1e-3), "shards:d": pytest.approx(0.8, abs=1e-3)}


@pytest.mark.parametrize(
    ("given", "retention", "message"),
    [
        ({"mixture": {"a": 1.0}}, {"replay": 0.5, "old": ["a"]}, "data.mixture both say"),
        ({}, {"replay": 0.5}, "say which datasets are old"),
        ({}, {"distillation": 1, "distil_on": "old"}, "say which datasets are old"),
    ],
)
def test_replay_that_cannot_be_is_refused(given: dict[str, object], retention: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_replay(data(**given), RetentionSettings.model_validate(retention))


@pytest.mark.parametrize("wrong", [{"new": ["a"], "old": ["b"]}, {"interpolate": [1.2]}, {"replay": 1.0}, {"l2": -1}])
def test_contradicting_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RetentionSettings.model_validate(wrong)


def test_what_is_new_makes_the_rest_old_and_nothing_is_old_unasked() -> None:
    assert RetentionSettings(new=("wall*",)).is_old("liver", "f:liver", "CT")
    assert not RetentionSettings(new=("wall*",)).is_old("wall_ct", "f:wall_ct", "CT")
    assert RetentionSettings(old=("CT",)).is_old("liver", "f:liver", "CT")
    assert not RetentionSettings().is_old("liver", "f:liver", "CT")


# ---------------------------------------------------------------------------------------------------- L2


def test_l2_moves_every_weight_by_its_own_rate_towards_its_start_after_the_step() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    anchors = Anchors(net)
    start = {name: value.clone() for name, value in anchors.values.items()}
    groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[1].parameters(), "lr": 0.02}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    pull_after_steps(optimizer, net, anchors, l2=2.0)
    net(torch.ones(1, 3)).sum().backward()
    moved = {n: p.detach() - (0.1 if n[0] == "0" else 0.02) * p.grad for n, p in net.named_parameters()}
    optimizer.step()
    for name, parameter in net.named_parameters():
        back = 2.0 * (0.1 if name[0] == "0" else 0.02)
        torch.testing.assert_close(parameter.detach(), moved[name] + back * (start[name] - moved[name]))


# ---------------------------------------------------------------------------------------------------- distillation


def test_divergence_is_that_of_two_bernoulli_variables() -> None:
    rng = np.random.default_rng(0)
    logits, soft = rng.normal(0, 3, 200), rng.normal(0, 3, 200)
    p, q = 1 / (1 + np.exp(-soft)), 1 / (1 + np.exp(-logits))
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    found = divergence(torch.tensor(logits), torch.tensor(soft)).numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-5)
    assert float(divergence(torch.tensor([40.0, -1024.0]), torch.tensor([40.0, -1024.0])).abs().max()) == 0


def frames(logits: Tensor, given: bool = False) -> list[TrackedFrame]:
    count = len(logits)
    step = Decoded(
        logits, torch.full((count, logits.shape[1]), 0.5), logits[:, :1], torch.ones(count, 1), torch.zeros(count, 4),
        given_mask=logits[:, :1] if given else None,
    )  # fmt: skip
    return [TrackedFrame(0, (step,), conditioning=True)]


def test_distillation_counts_chosen_objects_alone_and_pulls_towards_the_soft_masks() -> None:
    torch.manual_seed(0)
    soft, ours = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4, requires_grad=True)
    chosen, settings = torch.tensor([True, False, True]), LossSettings(focal=2.0)
    loss = distillation_loss(frames(ours), frames(soft), settings, chosen, torch.tensor(2.0))
    expected = 2.0 * divergence(ours, soft).flatten(1).mean(1)[chosen].sum() / 2
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, ours)
    assert float(gradient[1].abs().max()) == 0
    assert torch.equal(gradient[0].sign(), (ours - soft)[0].sign()), "a step against it goes towards the teacher"
    assert float(distillation_loss(frames(soft), frames(soft), settings, chosen, torch.tensor(2.0))) == 0
    assert float(distillation_loss(frames(ours, True), frames(soft, True), settings, chosen, torch.tensor(2.0))) == 0


def test_only_objects_of_old_clips_are_taught_where_that_is_asked_for() -> None:
    owners, datasets = torch.tensor([0, 0, 1, 2]), ("a", "b", "a")
    assert distilled_objects(owners, datasets, {"a"}).tolist() == [True, True, False, True]
    assert distilled_objects(owners, datasets, None).all()


def clip(seed: int = 0) -> AugmentedBatch:
    """Two clips of two frames with a square each."""
    torch.manual_seed(seed)
    masks = torch.zeros(2, 2, 128, 128, dtype=torch.bool)
    masks[0, :, 20:60, 30:80] = masks[1, :, 70:100, 40:60] = True
    return AugmentedBatch(
        torch.randn(2, 2, 3, 128, 128), masks, torch.tensor([0, 1]), torch.tensor([3, 4]), torch.tensor([1, 2]), 0,
        ("x", "y"), ("k", "l"), ("d", "e"), ("CT", "CT"),
    )  # fmt: skip


@pytest.mark.parametrize("adaptation", [AdaptationSettings(), AdaptationSettings(train=(), peft=PeftSettings())])
def test_the_starting_masks_stay_those_of_the_start_however_the_model_moves(adaptation: AdaptationSettings) -> None:
    own = TrainSettings.model_validate({"data": {"shards": "x"}, "output": "x", "retention": {"distillation": 1.0}})
    loaded = load_model("nano")
    apply_adaptation(loaded.sam, adaptation)
    module = FineTuner(loaded, own)
    batch, plan = clip(), PromptPlan("box", (0,), (0,), 1)
    with torch.no_grad():
        tracked = module.track(batch, plan)
    taught = module.starting_masks(batch, plan)
    everything = torch.ones(2, dtype=torch.bool)
    assert taught is not None and not taught[0].steps[0].all_logits.requires_grad
    assert float(distillation_loss(tracked, taught, own.loss, everything, torch.tensor(2.0))) < 1e-9
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter) * parameter.requires_grad)
    again = module.starting_masks(batch, plan)
    with torch.no_grad():
        tracked = module.track(batch, plan)
    assert again is not None
    torch.testing.assert_close(again[1].steps[0].all_logits, taught[1].steps[0].all_logits, rtol=1e-4, atol=1e-4)
    moved = distillation_loss(tracked, again, own.loss, everything, torch.tensor(2.0))
    assert float(moved) > 1e-3


# ---------------------------------------------------------------------------------------------------- moving average


class Half(nn.Module):
    """One frozen and one trained layer, and the hook that Lightning's callback asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained = nn.Linear(50, 50).requires_grad_(False), nn.Linear(2, 1)
        self.device = torch.device("cpu")


def test_the_moving_average_leaves_frozen_weights_to_the_last_bit_and_follows_the_others() -> None:
    from torch.optim.swa_utils import AveragedModel

    torch.manual_seed(0)
    module, callback = Half(), EmaAverage(0.9)
    average = AveragedModel(module, use_buffers=True, **callback._kwargs)
    expected = module.trained.weight.detach().clone()
    for step in range(30):
        with torch.no_grad():
            module.trained.weight.add_(1.0)
        average.update_parameters(module)
        now = module.trained.weight.detach()
        expected = now.clone() if step == 0 else 0.9 * expected + 0.1 * now
    assert torch.equal(average.module.frozen.weight, module.frozen.weight)
    torch.testing.assert_close(average.module.trained.weight.detach(), expected)
