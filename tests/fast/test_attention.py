"""`attend_separate_banks` computes for each object what `Tracker.condition` computes for objects that share a bank."""

from __future__ import annotations

import pytest
import torch

from medsam2.fast import attention as module
from medsam2.fast.attention import attend_separate_banks
from medsam2.model.build import ModelSpec, build_sam
from medsam2.model.memory_bank import Attended, Memory, MemoryBank
from medsam2.model.tracker import Features, Tracker

SIDE, OBJECTS, NOW = 64, 3, 9
weighted_mean = module._weighted_mean


@pytest.fixture(scope="module")
def tracker() -> Tracker:
    torch.manual_seed(0)
    sam = build_sam(ModelSpec("hiera_nano", image_size=SIDE))
    for name, parameter in sam.named_parameters():
        if "memory_attention" in name or "tpos" in name:  # untrained, memory would hardly matter
            parameter.data.mul_(2.0)
    return Tracker(sam).eval()


@pytest.fixture(scope="module")
def features(tracker: Tracker) -> Features:
    with torch.no_grad():
        frame = tracker.encode(torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)))
    return frame.select(torch.zeros(OBJECTS, dtype=torch.int64))


def bank_of(sam, frames: range, objects: int, seed: int = 2) -> MemoryBank:
    generator, bank, cells = torch.Generator().manual_seed(seed), MemoryBank(), SIDE // 16
    for frame in frames:
        spatial = torch.randn(objects, sam.mem_dim, cells, cells, generator=generator).bfloat16()
        pointer = torch.randn(objects, sam.hidden_dim, generator=generator)
        bank.add(frame, Memory(spatial, pointer), conditioning=frame == frames[0])
    return bank


def alone(bank: MemoryBank, index: int) -> MemoryBank:
    def row(memory: Memory) -> Memory:
        return Memory(memory.features[index : index + 1], memory.pointer[index : index + 1])

    return MemoryBank(*({t: row(m) for t, m in some.items()} for some in (bank.conditioning, bank.tracked)))


def attend(tracker: Tracker, bank: MemoryBank) -> Attended:
    return tracker.policy.attend(bank, NOW, False, 40, False)


@pytest.mark.parametrize("onednn", [True, False])
@torch.no_grad()
def test_objects_that_share_frames_recall_what_the_tracker_does(
    tracker: Tracker, features: Features, monkeypatch: pytest.MonkeyPatch, onednn: bool
) -> None:
    if not onednn:
        monkeypatch.setattr(module, "can_use_onednn", lambda *_: False)
    monkeypatch.setattr(
        module, "MAX_ATTENTION_WEIGHTS", 50 * 7
    )  # several pieces of queries, and a last one that is smaller
    bank = bank_of(tracker.sam, range(1, NOW), OBJECTS)
    expected = tracker.condition(features, bank, NOW, False, 40)
    conditioned = attend_separate_banks(tracker, features, [attend(tracker, alone(bank, i)) for i in range(OBJECTS)])
    assert (expected - features.embed).abs().max() > 0.1
    torch.testing.assert_close(conditioned, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_half_precision_is_as_near_to_the_exact_result_as_with_pytorchs_own_attention(
    tracker: Tracker, features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = bank_of(tracker.sam, range(1, NOW), OBJECTS)
    attended = [attend(tracker, alone(bank, i)) for i in range(OBJECTS)]
    exact = attend_separate_banks(tracker, features, attended)
    used = []
    monkeypatch.setattr(module, "_weighted_mean", lambda *arguments: used.append(1) or weighted_mean(*arguments))
    errors = []
    for fast in (module.can_use_onednn, lambda *_: False):
        monkeypatch.setattr(module, "can_use_onednn", fast)
        with torch.autocast("cpu", torch.bfloat16):
            errors.append((attend_separate_banks(tracker, features, attended) - exact).abs().mean())
    assert used, "oneDNN was not asked"
    assert errors[0] < 1.3 * errors[1] < 0.05


@torch.no_grad()
def test_objects_with_unequal_memories_come_back_in_order_and_as_if_alone(tracker: Tracker, features: Features) -> None:
    starts = (7, 1, 4, 7, 2)
    banks = [bank_of(tracker.sam, range(start, NOW), 1, seed) for seed, start in enumerate(starts)]
    together = attend_separate_banks(tracker, features, [attend(tracker, bank) for bank in banks])
    one = features.select(torch.zeros(1, dtype=torch.int64))
    for conditioned, bank in zip(together, banks, strict=True):
        torch.testing.assert_close(
            conditioned[None], tracker.condition(one, bank, NOW, False, 40), atol=2e-5, rtol=1e-4
        )


@torch.no_grad()
def test_without_temporal_encoding_the_order_of_memories_is_nothing(tracker: Tracker, features: Features) -> None:
    memories = list(bank_of(tracker.sam, range(4), 1).tracked.values())
    there, back = (
        attend_separate_banks(tracker, features, [Attended(tuple((None, m) for m in order), (), 1)])
        for order in (memories, memories[::-1])
    )
    timed = attend_separate_banks(tracker, features, [Attended(tuple(enumerate(memories)), (), 1)])
    torch.testing.assert_close(there, back, atol=1e-5, rtol=1e-4)
    assert (timed - there).abs().max() > 1e-3
