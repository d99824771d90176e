"""A clip through the tracker: order of frames, corrections, gradients, independence of the batch."""

from __future__ import annotations

import pytest
import torch

from medsam2.model.adaptation import AdaptationSettings, apply_adaptation
from medsam2.model.build import ModelSpec, build_sam
from medsam2.model.losses import LossSettings, clip_loss
from medsam2.model.rollout import rollout
from medsam2.model.tracker import TrackedFrame, Tracker
from medsam2.prompts.settings import PromptSettings
from medsam2.prompts.simulate import PromptPlan

FRAMES = 4
RECIPE = PromptSettings(corrections=2)


@pytest.fixture(scope="module")
def tracker() -> Tracker:
    torch.manual_seed(0)
    return Tracker(build_sam(ModelSpec("hiera_nano", "2.1", 128))).train()


def clip(clips: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Frames [B * T, 3, 128, 128], masks [2 B, T, 128, 128], object_to_clip, seeds."""
    frames = torch.randn(clips * FRAMES, 3, 128, 128, generator=torch.Generator().manual_seed(seed))
    masks = torch.zeros(2 * clips, FRAMES, 128, 128, dtype=torch.bool)
    for n in range(2 * clips):
        masks[n, :, 10 + 5 * n : 50 + 5 * n, 20:70] = True
    return frames, masks, torch.arange(2 * clips) // 2, torch.arange(2 * clips) * 31


def roll(tracker: Tracker, plan: PromptPlan, clips: int = 1) -> tuple[list[TrackedFrame], torch.Tensor]:
    frames, masks, owner, seeds = clip(clips)
    return rollout(tracker, tracker.encode(frames), masks, owner, seeds, plan, RECIPE), masks


def test_conditioning_frames_come_first_and_corrections_add_steps(tracker: Tracker) -> None:
    tracked, _ = roll(tracker, PromptPlan("box", (0, 2), (0, 2, 3), 2))
    assert [frame.frame for frame in tracked] == [0, 2, 1, 3]
    assert [len(frame.steps) for frame in tracked] == [3, 3, 1, 3]
    assert [frame.conditioning for frame in tracked] == [True, True, False, False]


def test_one_point_gives_three_candidates_a_box_one(tracker: Tracker) -> None:
    click, _ = roll(tracker, PromptPlan("click", (0,), (), 0))
    assert click[0].final.all_logits.shape[1] == 3
    box, _ = roll(tracker, PromptPlan("box", (0,), (), 0))
    assert box[0].final.all_logits.shape[1] == 1


@pytest.mark.parametrize("kind", ["mask", "box", "click", "dense"])
def test_every_kind_of_prompt_trains(tracker: Tracker, kind: str) -> None:
    tracker.zero_grad()
    tracked, masks = roll(tracker, PromptPlan(kind, (0,), () if kind == "mask" else (0,), 1))
    clip_loss(tracked, masks, LossSettings(), torch.tensor(2.0)).total.backward()
    for module in ("image_encoder", "sam_mask_decoder", "memory_attention", "memory_encoder"):
        gradients = [p.grad for n, p in tracker.sam.named_parameters() if n.startswith(module) and p.grad is not None]
        assert sum(float(g.abs().sum()) for g in gradients) > 0, module


def test_two_batches_of_one_clip_have_the_loss_of_one_batch_of_two(tracker: Tracker) -> None:
    frames, masks, owner, seeds = clip(2)
    plan = PromptPlan("click", (0,), (0,), 1)

    def loss(take_frames: slice, take: slice) -> float:
        features = tracker.encode(frames[take_frames])
        tracked = rollout(tracker, features, masks[take], owner[take] - owner[take][0], seeds[take], plan, RECIPE)
        return float(clip_loss(tracked, masks[take], LossSettings(), torch.tensor(1.0)).total.detach())

    with torch.no_grad():
        whole = loss(slice(None), slice(None))
        parts = loss(slice(0, FRAMES), slice(0, 2)) + loss(slice(FRAMES, None), slice(2, None))
    assert abs(whole - parts) < 1e-3 * whole


def test_adaptation_freezes_what_it_says() -> None:
    sam = build_sam(ModelSpec("hiera_nano", "2.1", 128))
    rows = {row.module: row for row in apply_adaptation(sam, AdaptationSettings(train=("mask_decoder",)))}
    assert rows["mask_decoder"].trained == rows["mask_decoder"].parameters
    assert all(row.trained == 0 for name, row in rows.items() if name != "mask_decoder")
    apply_adaptation(sam, AdaptationSettings(train=("all",), freeze=(r"image_encoder\.trunk\.",)))
    assert not any(p.requires_grad for n, p in sam.named_parameters() if n.startswith("image_encoder.trunk."))
    assert all(p.requires_grad for n, p in sam.named_parameters() if n.startswith("image_encoder.neck."))


def test_adaptation_pattern_without_a_match_is_refused() -> None:
    sam = build_sam(ModelSpec("hiera_nano", "2.1", 128))
    with pytest.raises(ValueError, match="image_encodr"):
        apply_adaptation(sam, AdaptationSettings(train=("image_encodr",)))
    with pytest.raises(ValueError, match="nothing to train"):
        apply_adaptation(sam, AdaptationSettings(train=("mask_decoder",), freeze=("mask_decoder",)))
