"""The tracker computes what `SAM2Base.track_step` computes."""

from __future__ import annotations

import pytest
import torch

from medsam2.model.build import ModelSpec, build_sam
from medsam2.model.memory_bank import Memory, MemoryBank, MemoryPolicy
from medsam2.model.tracker import Features, Tracker
from medsam2.prompts.kinds import Prompts

FRAMES, OBJECTS = 9, 2


@pytest.fixture(scope="module")
def tracker() -> Tracker:
    torch.manual_seed(0)
    sam = build_sam(ModelSpec("hiera_nano", "2.1", 128))
    for name, parameter in sam.named_parameters():  # untrained masks are flat: sharpen them
        if "hypernetworks" in name or "obj_score" in name:
            parameter.data.mul_(2.0)
    return Tracker(sam)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return torch.randn(FRAMES, 3, 128, 128, generator=torch.Generator().manual_seed(1))


def prompt(kind: str) -> tuple[Prompts, dict[str, torch.Tensor] | None, torch.Tensor | None]:
    if kind == "mask":
        masks = torch.zeros(OBJECTS, 1, 128, 128, dtype=torch.bool)
        masks[0, 0, 20:70, 30:80] = True
        masks[1, 0, 60:100, 10:50] = True
        return Prompts(masks=masks), None, masks.float()
    boxes = torch.tensor([[30.0, 20, 80, 70], [10, 60, 50, 100]])
    prompts = Prompts.from_boxes(boxes)
    if kind == "click":
        prompts = Prompts(torch.tensor([[[50.0, 40.0]], [[30.0, 80.0]]]), torch.ones(2, 1, dtype=torch.int32))
    assert prompts.points is not None and prompts.labels is not None
    return prompts, {"point_coords": prompts.points, "point_labels": prompts.labels}, None


@pytest.mark.parametrize("kind", ["box", "click", "mask"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
@torch.no_grad()
def test_tracker_equals_track_step(
    tracker: Tracker, frames: torch.Tensor, kind: str, training: bool, reverse: bool
) -> None:
    tracker.train(training)
    sam = tracker.sam
    sam.binarize_mask_from_pts_for_mem_enc = True
    features = tracker.encode(frames)
    _, levels, positions, sizes = sam._prepare_backbone_features(sam.forward_image(frames))
    outputs: dict[str, dict[int, dict]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    bank, first = MemoryBank(), FRAMES - 1 if reverse else 0
    for frame in range(FRAMES)[:: -1 if reverse else 1]:
        prompts, points, masks = prompt(kind) if frame == first else (None, None, None)
        index = torch.full((OBJECTS,), frame)
        theirs = sam.track_step(
            frame, frame == first, [x[:, index] for x in levels], [x[:, index] for x in positions], sizes,
            points, masks, outputs, FRAMES, track_in_reverse=reverse,
        )  # fmt: skip
        outputs["cond_frame_outputs" if frame == first else "non_cond_frame_outputs"][frame] = theirs
        here = features.select(index)
        conditioned = tracker.condition(here, bank, frame, reverse, FRAMES)
        ours = tracker.segment(here, bank, frame, prompts, conditioned=conditioned)
        memory = tracker.memorise(here, ours)
        bank.add(frame, memory, conditioning=frame == first)
        assert torch.allclose(ours.logits, theirs["pred_masks"], atol=1e-5)
        assert torch.allclose(memory.features, theirs["maskmem_features"], atol=1e-5)
        assert torch.allclose(memory.pointer, theirs["obj_ptr"], atol=1e-5)


def test_unprompted_first_frame_is_refused(tracker: Tracker, frames: torch.Tensor) -> None:
    features = tracker.encode(frames[:1])
    with pytest.raises(ValueError, match="conditioning frame"):
        tracker.segment(features, MemoryBank(), 0)


def test_an_object_does_not_change_another(tracker: Tracker, frames: torch.Tensor) -> None:
    tracker.eval()
    features = tracker.encode(frames[:1])
    boxes = torch.tensor([[30.0, 20, 80, 70], [10, 60, 50, 100], [5, 5, 25, 25]])
    index = torch.zeros(3, dtype=torch.long)
    together = tracker.segment(features.select(index), MemoryBank(), 0, Prompts.from_boxes(boxes))
    alone = tracker.segment(features.select(index[:1]), MemoryBank(), 0, Prompts.from_boxes(boxes[1:2]))
    assert torch.allclose(together.logits[1:2], alone.logits, atol=1e-5)


def test_frozen_encoder_keeps_no_graph(tracker: Tracker, frames: torch.Tensor) -> None:
    for parameter in tracker.sam.image_encoder.parameters():
        parameter.requires_grad_(False)
    features: Features = tracker.encode(frames[:1])
    assert not features.embed.requires_grad
    for parameter in tracker.sam.image_encoder.parameters():
        parameter.requires_grad_(True)


def memory(value: float) -> Memory:
    return Memory(torch.full((1, 1, 1, 1), value), torch.full((1, 1), value))


def test_policy_attends_to_conditioning_frames_then_the_last_six_oldest_first() -> None:
    bank = MemoryBank()
    bank.add(0, memory(0.0), conditioning=True)
    for frame in range(1, 12):
        bank.add(frame, memory(float(frame)), conditioning=False)
    attended = MemoryPolicy().attend(bank, 12, reverse=False, num_frames=40, training=False)
    assert [(row, float(m.features)) for row, m in attended.spatial] == [
        (6, 0.0), (5, 6.0), (4, 7.0), (3, 8.0), (2, 9.0), (1, 10.0), (0, 11.0)]  # fmt: skip
    assert [distance for distance, _ in attended.pointers] == [12, *range(1, 12)]


def test_a_frame_is_conditioning_or_tracked_never_both() -> None:
    bank = MemoryBank()
    bank.add(3, memory(1.0), conditioning=False)
    bank.add(3, memory(2.0), conditioning=True)
    assert list(bank.conditioning) == [3] and not bank.tracked
