"""A clip through the tracker: order of frames, corrections, gradients, independence of the batch."""

from __future__ import annotations

import copy

import pytest
import torch
from host_reads import host_traffic

from medsam2.adaptation.freeze import AdaptationSettings, apply_adaptation
from medsam2.model.build import ModelSpec, build_sam
from medsam2.model.losses import LossSettings, clip_loss
from medsam2.model.memory_bank import Memory, MemoryBank
from medsam2.model.rollout import rollout
from medsam2.model.tracker import TrackedFrame, Tracker
from medsam2.prompts.initial import INITIAL_KINDS
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


def test_a_prompt_in_the_middle_gives_the_mirrored_result_of_the_mirrored_clip(tracker: Tracker) -> None:
    """Tracking backwards from the last frame is tracking forwards through the reversed clip."""
    frames, masks, owner, seeds = clip(1)
    encoded, mirrored = (tracker.encode(values) for values in (frames, frames.flip(0)))
    back = rollout(tracker, encoded, masks, owner, seeds, PromptPlan("mask", (3,), (), 0), RECIPE)
    forth = rollout(tracker, mirrored, masks.flip(1), owner, seeds, PromptPlan("mask", (0,), (), 0), RECIPE)
    assert [frame.frame for frame in back] == [3, 2, 1, 0]
    for ours, theirs in zip(back, forth, strict=True):
        torch.testing.assert_close(ours.final.logits, theirs.final.logits, atol=1e-4, rtol=1e-4)


def test_one_point_gives_three_candidates_a_box_one(tracker: Tracker) -> None:
    click, _ = roll(tracker, PromptPlan("click", (0,), (), 0))
    assert click[0].final.all_logits.shape[1] == 3
    box, _ = roll(tracker, PromptPlan("box", (0,), (), 0))
    assert box[0].final.all_logits.shape[1] == 1


@pytest.mark.parametrize("kind", [*sorted(INITIAL_KINDS), "dense"])
def test_every_kind_of_prompt_trains(tracker: Tracker, kind: str) -> None:
    tracker.zero_grad()
    tracked, masks = roll(tracker, PromptPlan(kind, (0,), () if kind == "mask" else (0,), 1))
    clip_loss(tracked, masks, LossSettings(), torch.tensor(2.0)).total.backward()
    for module in ("image_encoder", "sam_mask_decoder", "memory_attention", "memory_encoder"):
        gradients = [p.grad for n, p in tracker.sam.named_parameters() if n.startswith(module) and p.grad is not None]
        assert sum(float(g.abs().sum()) for g in gradients) > 0, module


@pytest.mark.parametrize("kind", [*sorted(INITIAL_KINDS), "dense"])
def test_a_rollout_reads_no_value_back_to_the_host(tracker: Tracker, kind: str) -> None:
    """Encoder, memory, decoder and corrections, ours and Meta's modules, forwards and backwards in time."""
    frames, masks, owner, seeds = clip(1)
    plan = PromptPlan(kind, (1, 3), () if kind == "mask" else (1, 2, 3), 2)
    with host_traffic() as traffic:
        rollout(tracker, tracker.encode(frames), masks, owner, seeds, plan, RECIPE)
    assert not traffic.reads, traffic


def test_a_rollout_runs_where_there_are_no_values_to_read(tracker: Tracker) -> None:
    """On PyTorch's meta device tensors have shapes alone: whatever depended on a value would raise."""
    frames, masks, owner, seeds = (values.to("meta") for values in clip(1))
    shapes = copy.deepcopy(tracker).to("meta")
    tracked = rollout(
        shapes, shapes.encode(frames), masks, owner, seeds, PromptPlan("scribble", (1,), (1, 2), 2), RECIPE
    )
    assert [frame.final.logits.shape for frame in tracked] == [(2, 1, 32, 32)] * FRAMES


@pytest.mark.parametrize("as_prompted", [True, False])
def test_a_corrected_frame_enters_the_memory_as_the_recipe_says(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, as_prompted: bool
) -> None:
    stored: dict[int, bool] = {}
    add = MemoryBank.add

    def spy(bank: MemoryBank, frame: int, memory: Memory, conditioning: bool) -> None:
        stored[frame] = conditioning
        add(bank, frame, memory, conditioning)

    monkeypatch.setattr(MemoryBank, "add", spy)
    frames, masks, owner, seeds = clip(1)
    recipe = PromptSettings(corrected_as_conditioning=as_prompted)
    with torch.no_grad():
        rollout(tracker, tracker.encode(frames), masks, owner, seeds, PromptPlan("box", (0,), (0, 1), 1), recipe)
    assert stored == {0: True, 1: as_prompted, 2: False}


def test_an_object_that_is_absent_on_a_prompted_frame_is_still_tracked(tracker: Tracker) -> None:
    frames, masks, owner, seeds = clip(1)
    masks[1, 2] = False
    for kind in sorted(INITIAL_KINDS):
        plan = PromptPlan(kind, (0, 2), () if kind == "mask" else (0, 2), 1)
        with torch.no_grad():
            tracked = rollout(tracker, tracker.encode(frames), masks, owner, seeds, plan, RECIPE)
            loss = clip_loss(tracked, masks, LossSettings(), torch.tensor(2.0)).total
        assert loss.isfinite(), kind


@pytest.mark.parametrize("kind", [*sorted(INITIAL_KINDS), "dense"])
def test_two_batches_of_one_clip_have_the_loss_of_one_batch_of_two(tracker: Tracker, kind: str) -> None:
    frames, masks, owner, seeds = clip(2)
    plan = PromptPlan(kind, (0,), () if kind == "mask" else (0,), 1)

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
    apply_adaptation(sam, AdaptationSettings(train=("mask_decoder",)))
    unused = {name for name, p in sam.sam_mask_decoder.named_parameters() if not p.requires_grad}
    trained = {name.split(".")[0] for name, p in sam.named_parameters() if p.requires_grad}
    assert trained == {"sam_mask_decoder"} and unused == set()
    apply_adaptation(sam, AdaptationSettings(train=("all",), freeze=(r"image_encoder\.trunk\.",)))
    assert not any(p.requires_grad for n, p in sam.named_parameters() if n.startswith("image_encoder.trunk."))
    assert all(p.requires_grad for n, p in sam.named_parameters() if n.startswith("image_encoder.neck."))


def test_adaptation_pattern_without_a_match_is_refused() -> None:
    sam = build_sam(ModelSpec("hiera_nano", "2.1", 128))
    with pytest.raises(ValueError, match="image_encodr"):
        apply_adaptation(sam, AdaptationSettings(train=("image_encodr",)))
    with pytest.raises(ValueError, match="nothing to train"):
        apply_adaptation(sam, AdaptationSettings(train=("mask_decoder",), freeze=("mask_decoder",)))
