"""One training step has the losses and gradients of Meta's `SAM2Train` and `MultiStepMultiMasksAndIous`.

Same weights, clip, prompts and corrections, dropout off. Two deliberate differences (docs/explanation/decisions.md)
are switched off or avoided: `Tracker.previous_limit` is None, and the object score is raised until every object is
believed present, since Meta's loss sees blanked masks where one is not. Meta also counts the constant loss of a mask
that was given.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import medsam2.model.rollout as rollout_module
from medsam2.fast.execution import SpeedSettings, apply_speed
from medsam2.model.build import ModelSpec, build_sam, import_sam2, load_model
from medsam2.model.losses import LossSettings, clip_loss
from medsam2.model.rollout import rollout
from medsam2.model.tracker import Tracker
from medsam2.prompts.kinds import Prompts
from medsam2.prompts.settings import PromptSettings
from medsam2.prompts.simulate import PromptPlan

PEERS = Path(__file__).resolve().parents[2] / "build" / "peers"
FRAMES, CORRECTIONS, SIDE = 4, 2, 128
WEIGHTS = {"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1}


@dataclass
class MetaDraws:
    """What Meta's step drew: prompts by frame, clicks in order, and the frames."""

    first: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    clicks: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    conditioning: tuple[int, ...] = ()
    corrected: tuple[int, ...] = ()


@pytest.fixture(scope="module")
def peer() -> Iterator[Any]:
    """Meta's training package, on the path for this module's tests."""
    source = next(iter(sorted(PEERS.glob("sam2-*/training"))), None)
    if source is None:
        pytest.skip(f"{PEERS} holds no sam2-*/training to compare with; `make peers` fetches it")
    import_sam2()  # the installed package, before its twin beside `training` is on the path
    path = list(sys.path)
    sys.path += [str(source.parent), str(PEERS / "site")]
    try:
        # the losses take one name from their trainer, which needs tensorboard
        sys.modules["training.trainer"] = ModuleType("training.trainer")
        sys.modules["training.trainer"].CORE_LOSS_KEY = "core_loss"  # type: ignore[attr-defined]
        from training import loss_fns
        from training.model import sam2

        yield SimpleNamespace(model=sam2, loss=loss_fns)
    finally:
        sys.path[:] = path
        for name in [name for name in sys.modules if name.split(".")[0] == "training"]:
            del sys.modules[name]


def clip(objects: int) -> tuple[Tensor, Tensor]:
    """Frames [T, 3, S, S] with moving squares, masks bool [N, T, S, S]."""
    frames = torch.randn(FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4)) * 0.3
    masks = torch.zeros(objects, FRAMES, SIDE, SIDE, dtype=torch.bool)
    for n in range(objects):
        for t in range(FRAMES):
            left, top = 10 + 35 * n + 3 * t, 15 + 25 * n
            masks[n, t, top : top + 40, left : left + 30] = True
            frames[t] += masks[n, t] * (1.0 + 0.5 * n)
    return frames, masks


def meta_step(
    peer: Any, sam: Any, frames: Tensor, masks: Tensor, kind: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Tensor], MetaDraws]:
    draws = MetaDraws()
    sample, box = peer.model.get_next_point, peer.model.sample_box_points

    def click(gt_masks: Tensor, pred_masks: Tensor | None, method: str) -> tuple[Tensor, Tensor]:
        point: tuple[Tensor, Tensor] = sample(gt_masks, pred_masks, method)
        if draws.conditioning:
            draws.clicks.append(point)
        return point

    prepare = sam.prepare_prompt_inputs

    def prepared(*arguments: Any) -> dict[str, Any]:
        plan: dict[str, Any] = prepare(*arguments)
        draws.conditioning = tuple(int(t) for t in plan["init_cond_frames"])
        draws.corrected = tuple(int(t) for t in plan["frames_to_add_correction_pt"])
        for t, points in plan["point_inputs_per_frame"].items():
            draws.first[t] = (points["point_coords"], points["point_labels"])
        return plan

    monkeypatch.setattr(peer.model, "get_next_point", click)
    monkeypatch.setattr(peer.model, "sample_box_points", box)
    monkeypatch.setattr(sam, "prepare_prompt_inputs", prepared)
    times = torch.arange(FRAMES)[:, None].expand(FRAMES, len(masks))
    batch = SimpleNamespace(flat_img_batch=frames, num_frames=FRAMES, masks=masks.transpose(0, 1),
                            flat_obj_to_img_idx=times)  # fmt: skip
    torch.manual_seed(0)
    outputs, targets = sam(batch), batch.masks
    if kind == "mask":
        supervised = [t for t in range(FRAMES) if t not in draws.conditioning]
        outputs, targets = [outputs[t] for t in supervised], targets[supervised]
    criterion = peer.loss.MultiStepMultiMasksAndIous(
        dict(WEIGHTS), supervise_all_iou=True, iou_use_l1_loss=True, pred_obj_scores=True
    )
    return criterion(outputs, targets), draws


def our_step(
    tracker: Tracker, frames: Tensor, masks: Tensor, kind: str, draws: MetaDraws, monkeypatch: pytest.MonkeyPatch
) -> Any:
    clicks = iter(draws.clicks)

    def first(truth: Tensor, kind: str, seeds: Tensor, frame: int, *rest: Any) -> Prompts:
        return Prompts(masks=truth[:, None]) if kind == "mask" else Prompts(*draws.first[frame])

    monkeypatch.setattr(rollout_module, "initial_prompts", first)
    monkeypatch.setattr(rollout_module, "correction_click", lambda *_: next(clicks))
    plan = PromptPlan(kind, draws.conditioning, draws.corrected, CORRECTIONS)
    owner = torch.zeros(len(masks), dtype=torch.int64)
    recipe = PromptSettings(corrections=CORRECTIONS, corrected_as_conditioning=True)
    tracked = rollout(tracker, tracker.encode(frames), masks, owner, torch.arange(len(masks)), plan, recipe)
    assert all((step.object_score > 0).all() for frame in tracked for step in frame.steps)
    assert next(clicks, None) is None
    return clip_loss(tracked, masks, LossSettings(), torch.tensor(float(len(masks))))


def recipe_of(kind: str) -> dict[str, Any]:
    return {
        "prob_to_use_pt_input_for_train": 0.0 if kind == "mask" else 1.0,
        "prob_to_use_box_input_for_train": 1.0 if kind == "box" else 0.0,
        "num_frames_to_correct_for_train": 3,
        "num_init_cond_frames_for_train": 2,
        "rand_init_cond_frames_for_train": False,
        "add_all_frames_to_correct_as_cond": True,
        "num_correction_pt_per_frame": CORRECTIONS,
    }


@pytest.mark.parametrize(
    ("size", "kind", "objects", "checkpointed"),
    [
        ("hiera_nano", "click", 1, False),
        ("hiera_nano", "box", 3, False),
        ("hiera_nano", "mask", 3, False),
        ("hiera_nano", "click", 3, True),
        ("hiera_tiny", "box", 2, False),  # windows that reach beyond the grid, as at 512 px
    ],
)
def test_a_training_step_has_metas_losses_and_gradients(
    peer: Any, monkeypatch: pytest.MonkeyPatch, size: str, kind: str, objects: int, checkpointed: bool
) -> None:
    torch.manual_seed(1)
    spec = ModelSpec(size, image_size=SIDE)
    ours = load_model("nano").sam if size == "hiera_nano" else build_sam(spec)
    with torch.no_grad():
        ours.sam_mask_decoder.pred_obj_score_head.layers[2].bias += 20.0
    theirs = build_sam(spec, target="training.model.sam2.SAM2Train", overrides=recipe_of(kind)).train()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    tracker, other = Tracker(ours).train(), Tracker(theirs)
    every = ("image_encoder", "memory_attention", "mask_decoder", "memory_encoder")
    apply_speed(tracker, SpeedSettings(checkpoint=every if checkpointed else ()))
    apply_speed(other, SpeedSettings())  # their dropout
    theirs.sam_mask_decoder.dynamic_multimask_via_stability = False  # as they train
    tracker.previous_limit = None

    frames, masks = clip(objects)
    expected, draws = meta_step(peer, theirs, frames, masks, kind, monkeypatch)
    losses = our_step(tracker, frames, masks, kind, draws, monkeypatch)
    for name, part in {"mask": "focal", "dice": "dice", "iou": "iou", "class": "presence"}.items():
        their_part = torch.as_tensor(expected[f"loss_{name}"])
        torch.testing.assert_close(getattr(losses, part), their_part, atol=1e-4, rtol=1e-4, msg=f"{name}: {their_part}")
    torch.testing.assert_close(losses.total, expected["core_loss"], atol=1e-4, rtol=1e-4)

    expected["core_loss"].backward()
    losses.total.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    whole = torch.stack([g.norm() for g in gradients.values()]).norm()
    for name, parameter in ours.named_parameters():
        expected_gradient = gradients.get(name, torch.zeros_like(parameter))
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        # below 1e-6 of all there is but rounding: the keys' biases, for instance, have no effect
        assert (got - expected_gradient).norm() <= 1e-3 * expected_gradient.norm() + 1e-6 * whole, name
