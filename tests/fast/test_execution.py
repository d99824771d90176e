"""Settings of speed and memory: each does what it says, and changes no result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import medsam2.fast.attention as attention_module
from medsam2.fast import execution as speed_module
from medsam2.fast.encoder import recompute_input
from medsam2.fast.execution import SpeedSettings, apply_speed, attention_dropout, set_attention_dropout
from medsam2.model.build import ModelSpec, build_sam, load_model
from medsam2.model.losses import LossSettings, clip_loss
from medsam2.model.rollout import rollout
from medsam2.model.tracker import Tracker
from medsam2.prompts.settings import PromptSettings
from medsam2.prompts.simulate import PromptPlan

FRAMES, SIDE, OBJECTS = 3, 64, 3
PARTS = ("image_encoder", "memory_attention", "mask_decoder", "memory_encoder")


def small(**settings: Any) -> Tracker:
    torch.manual_seed(0)
    tracker = Tracker(build_sam(ModelSpec("hiera_nano", image_size=SIDE))).train()
    apply_speed(tracker, SpeedSettings(**settings))
    return tracker


def loss_of(tracker: Tracker, corrected: tuple[int, ...] = (0, 1), **settings: Any) -> Tensor:
    frames = torch.randn(FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    masks = torch.zeros(OBJECTS, FRAMES, SIDE, SIDE, dtype=torch.bool)
    for n in range(OBJECTS):
        masks[n, :, 10 + 8 * n : 30 + 8 * n, 20:50] = True
    plan, owner = PromptPlan("box", (0,), corrected, 2), torch.zeros(OBJECTS, dtype=torch.int64)
    tracked = rollout(tracker, tracker.encode(frames), masks, owner, torch.arange(OBJECTS), plan, PromptSettings())
    return clip_loss(tracked, masks, LossSettings(**settings), torch.tensor(float(OBJECTS))).total


def stored_bytes(make: Callable[[], Tensor], but: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of what `make` gives, parameters aside."""
    known = {p.untyped_storage().data_ptr() for p in but.parameters()}
    stored: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        stored.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = make()
    assert result.requires_grad
    return sum(t.untyped_storage().nbytes() for place, t in stored.items() if place not in known)


@pytest.mark.parametrize("part", PARTS)
def test_a_checkpointed_part_keeps_less_and_gives_the_same(part: str) -> None:
    usual, recomputing = small(), small(checkpoint=(part,))
    less, more = (stored_bytes(lambda tracker=t: loss_of(tracker), t) for t in (recomputing, usual))  # type: ignore[misc]
    assert less < 0.95 * more
    losses = [loss_of(tracker) for tracker in (usual, recomputing)]
    assert torch.equal(*losses)
    for value in losses:
        value.backward()
    for ours, theirs in zip(recomputing.sam.parameters(), usual.sam.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None and theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_full_resolution_logits_are_not_kept() -> None:
    tracker = small()
    less, more = (stored_bytes(lambda r=r: loss_of(tracker, recompute=r), tracker) for r in (True, False))  # type: ignore[misc]
    steps = 3 + 3 + 1
    full = steps * OBJECTS * SIDE * SIDE * 4
    assert more - less > 3 * full, "logits, their probabilities, and what the focal loss makes of them"


@pytest.mark.parametrize("part", PARTS)
def test_a_compiled_part_runs_through_torch_compile(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls[function.__name__] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(speed_module.torch, "compile", compiled)
    speed_module._compiled.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=1):  # put back afterwards
        loss = loss_of(small(compile=(part,)))
        assert torch._dynamo.config.recompile_limit >= 7, "one function, seven blocks"
    speed_module._compiled.cache_clear()
    expected = {"image_encoder": ("run_block", 7), "memory_attention": ("run_layer", 2 * 2),
                "mask_decoder": ("predict_masks", 3 + 3 + 1), "memory_encoder": ("encode_memory", 2)}[part]  # fmt: skip
    assert calls == {expected[0]: expected[1]}
    assert torch.equal(loss, loss_of(small()))


def test_attention_dropout_is_off_unless_it_is_asked_for() -> None:
    sam = build_sam(ModelSpec("hiera_tiny", image_size=SIDE))
    assert attention_dropout(sam) == pytest.approx(0.1), "what the package's yaml says"
    tracker = Tracker(sam).train()
    apply_speed(tracker, SpeedSettings())
    assert attention_dropout(sam) == 0
    assert torch.equal(loss_of(tracker), loss_of(tracker))
    apply_speed(tracker, SpeedSettings(attention_dropout=0.3))
    assert not torch.equal(loss_of(tracker), loss_of(tracker))
    names = {n.rpartition(".")[2] for n, m in sam.memory_attention.named_modules() if getattr(m, "p", None) == 0.3}
    assert names == {"dropout", "dropout1", "dropout2", "dropout3"}


def test_an_adapters_own_dropout_stays() -> None:
    sam = build_sam(ModelSpec("hiera_nano", image_size=SIDE))
    sam.memory_attention.layers[0].linear1.lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.25)})
    set_attention_dropout(sam, 0.0)
    assert sam.memory_attention.layers[0].linear1.lora_dropout["default"].p == 0.25


def test_objects_of_a_clip_share_the_first_self_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    row_counts: list[int] = []
    layer = attention_module.run_layer

    def spy(module: Any, x: Tensor, *rest: Any) -> Tensor:
        row_counts.append(len(x))
        return layer(module, x, *rest)

    monkeypatch.setattr(attention_module, "run_layer", spy)
    loss_of(small())
    assert row_counts == [1, OBJECTS] * 2, "two tracked frames, two layers; corrections attend to nothing anew"
    row_counts.clear()
    loss_of(small(attention_dropout=0.1))
    assert row_counts == [OBJECTS, OBJECTS] * 2, "dropout is drawn for each object"


def test_a_frozen_encoder_runs_without_a_graph() -> None:
    tracker = small()
    usual = stored_bytes(lambda: loss_of(tracker), tracker)
    tracker.sam.image_encoder.requires_grad_(False)
    assert stored_bytes(lambda: loss_of(tracker), tracker) < 0.8 * usual
    loss_of(tracker).backward()
    assert all(p.grad is None for p in tracker.sam.image_encoder.parameters())
    assert all(p.grad is not None for p in tracker.sam.sam_mask_decoder.conv_s0.parameters())


@pytest.mark.parametrize("cheap", [nn.GELU(), nn.LayerNorm(8)])
def test_what_is_computed_again_gives_the_same_gradients_and_is_not_kept(cheap: nn.Module) -> None:
    costly = nn.Linear(8, 4)
    x = torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    sources = [x, *cheap.parameters(), *costly.parameters()]
    gradients = [
        torch.autograd.grad(made.sin().sum(), sources) for made in (recompute_input(cheap, x, costly), costly(cheap(x)))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    both = nn.Sequential(cheap, costly)
    less, more = stored_bytes(lambda: recompute_input(cheap, x, costly), both), stored_bytes(lambda: both(x), both)
    assert more - less == x.numel() * 4


def test_by_default_a_part_is_just_called() -> None:
    assert SpeedSettings().run("mask_decoder", lambda a, b: a + b, 1, 2) == 3


def test_the_shipped_model_tracks_the_same_under_every_setting() -> None:
    losses = []
    for checkpoint in ((), PARTS):
        tracker = Tracker(load_model("nano", ModelSpec("hiera_nano", image_size=SIDE)).sam).train()
        apply_speed(tracker, SpeedSettings(checkpoint=checkpoint))
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(loss_of(tracker))
    assert torch.equal(*losses)
