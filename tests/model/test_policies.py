"""Memory policies against rules written down once more in NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from medsam2.errors import UserError
from medsam2.model.build import ModelSpec, build_sam
from medsam2.model.memory_bank import Memory, MemoryBank, MemoryPolicy
from medsam2.model.policies import POLICIES, MemorySettings, make_policy
from medsam2.model.policies.pruned import PrunedPolicy
from medsam2.model.policies.self_sorting import SelfSortingPolicy, sample_indices
from medsam2.model.tracker import Tracker

CONFIGS = Path(__file__).parents[2] / "configs" / "memory"
WIDTH, SIDE = 8, 4


def a_memory(generator: torch.Generator, iou: float = 0.9) -> Memory:
    return Memory(
        torch.randn(1, WIDTH, SIDE, SIDE, generator=generator),
        torch.randn(1, 2 * WIDTH, generator=generator),
        torch.tensor([iou]),
        torch.randn(1, WIDTH, SIDE, SIDE, generator=generator),
    )


def a_bank(frames: int, seed: int = 0) -> MemoryBank:
    generator = torch.Generator().manual_seed(seed)
    bank = MemoryBank()
    for frame in range(frames):
        bank.add(frame, a_memory(generator), conditioning=frame == 0)
    return bank


def pruned_by_numpy(bank: MemoryBank, now: int, table: np.ndarray, drop: int) -> list[int]:
    """Frames that SurgSAM-2 attends to at frame `now`, in order."""
    frames = [0, *range(max(now - 6, 1), now)]
    rows = [6, *[now - t - 1 for t in frames[1:]]]
    if len(frames) < 7:
        return frames
    held = {**bank.conditioning, **bank.tracked}
    tokens = [
        held[t].features[0].numpy().reshape(WIDTH, -1) + table[row][:, None]
        for t, row in zip(frames, rows, strict=True)
    ]
    newest = tokens[-1]

    def similarity(token: np.ndarray) -> float:
        norms = np.linalg.norm(token, axis=0) * np.linalg.norm(newest, axis=0)
        return float(((token * newest).sum(0) / norms).sum())

    candidates = sorted(range(1, 6), key=lambda index: similarity(tokens[index]))
    return [t for index, t in enumerate(frames) if index not in candidates[-drop:]]


def frames_of(spatial, bank: MemoryBank) -> list[int]:
    held = {**bank.conditioning, **bank.tracked}
    return [next(t for t, memory in held.items() if memory is attended) for _, attended in spatial]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("now", [3, 6, 7, 11])
def test_pruning_drops_what_repeats_the_newest_memory(seed: int, now: int) -> None:
    table = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(9))
    policy, bank = PrunedPolicy(drop=2, encoding=table), a_bank(now, seed)
    attended = policy.attend(bank, now, False, 40, False)
    assert frames_of(attended.spatial, bank) == pruned_by_numpy(bank, now, table.numpy(), 2)
    everything = MemoryPolicy().attend(bank, now, False, 40, False)
    assert [d for d, _ in attended.pointers] == [d for d, _ in everything.pointers]
    assert set(attended.spatial) <= set(everything.spatial), "a stored memory keeps its temporal encoding"


def test_pruning_leaves_a_bank_that_is_not_full_and_training_alone() -> None:
    policy = PrunedPolicy(drop=2, encoding=torch.zeros(7, WIDTH))
    for now, training in ((6, False), (11, True)):
        bank = a_bank(now)
        attended, plain = (p.attend(bank, now, False, 40, training) for p in (policy, MemoryPolicy()))
        assert attended == plain


def test_pruning_refuses_to_decide_for_several_objects_at_once() -> None:
    bank = MemoryBank()
    for frame in range(9):
        bank.add(frame, Memory(torch.randn(2, WIDTH, SIDE, SIDE), torch.randn(2, WIDTH)), conditioning=frame == 0)
    with pytest.raises(ValueError, match="memories of one object"):
        PrunedPolicy(drop=2, encoding=torch.zeros(7, WIDTH)).attend(bank, 9, False, 40, False)


def sorting(capacity: int = 4, seed: int = 0) -> SelfSortingPolicy:
    return SelfSortingPolicy(capacity=capacity, confidence=0.6, seed=seed)


@pytest.mark.parametrize("seed", range(3))
def test_self_sorting_keeps_the_sure_and_least_similar(seed: int) -> None:
    generator, policy, bank = torch.Generator().manual_seed(seed), sorting(), MemoryBank()
    stored: dict[int, np.ndarray] = {}
    sure = np.random.default_rng(seed).random(14)
    for frame in range(14):
        memory = a_memory(generator, float(sure[frame]))
        policy.admit(bank, frame, memory, conditioning=frame == 0)
        if frame and float(memory.iou) < 0.6:
            continue
        stored[frame] = memory.features.numpy().ravel()
        if len(stored) > 4:  # the paper: score each by the sum of (1 - cosine) to the others, keep the top K
            score = {
                a: sum(1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y) for b, y in stored.items() if b != a)
                for a, x in stored.items()
            }
            del stored[min(score, key=lambda t: score[t])]
    assert sorted({**bank.conditioning, **bank.tracked}) == sorted(stored)


def test_samples_follow_the_softmax_of_the_similarities_and_repeat_with_the_seed() -> None:
    similarities = np.array([0.9, -0.4, 0.1])
    sample = sample_indices(similarities, 60_000, (1, 2, 0))
    expected = np.exp(similarities) / np.exp(similarities).sum()
    assert np.allclose(np.bincount(sample, minlength=3) / len(sample), expected, atol=0.01)
    first, second, other = (sample_indices(similarities, 20, (seed, 2, 0)) for seed in (1, 1, 2))
    assert first == second != other


def test_self_sorting_attends_to_a_draw_without_time_and_pointers() -> None:
    generator, policy, bank = torch.Generator().manual_seed(0), sorting(), MemoryBank()
    for frame in range(3):
        policy.admit(bank, frame, a_memory(generator), conditioning=frame == 0)
    image = bank.tracked[2].image
    attended = policy.attend(bank, 5, False, 40, False, image)
    assert len(attended.spatial) == policy.capacity and attended.pointers == ()
    assert all(row is None for row, _ in attended.spatial)
    again = policy.attend(bank, 5, False, 40, False, image)
    assert [id(m) for _, m in attended.spatial] == [id(m) for _, m in again.spatial]
    likely = [frames_of(policy.attend(bank, now, False, 999, False, image).spatial, bank) for now in range(300)]
    counts = np.bincount(np.concatenate(likely), minlength=3)
    assert counts[2] == counts.max(), "the memory of the same image is sampled most often"
    with pytest.raises(ValueError, match="embedding"):
        policy.attend(bank, 5, False, 40, False)


def test_every_memory_yaml_makes_its_policy_and_a_wrong_name_is_answered() -> None:
    sam = build_sam(ModelSpec("hiera_nano", image_size=64))
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names == set(POLICIES)
    for name in names:
        settings = MemorySettings.model_validate(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
        assert settings.policy == name
        module = type(make_policy(settings, sam)).__module__
        assert module in (f"medsam2.model.policies.{name}", "medsam2.model.memory_bank")
    with pytest.raises(UserError, match="self_sorting"):
        make_policy(MemorySettings(policy="selfsorting"), sam)


def test_clips_follow_a_policy_that_is_made_for_them_and_else_sam2s_rule() -> None:
    sam = build_sam(ModelSpec("hiera_nano", image_size=64))
    for name in ("pruned", "self_sorting"):
        tracker = Tracker(sam, make_policy(MemorySettings(policy=name), sam))
        assert tracker.policy is not tracker.clip_policy and type(tracker.clip_policy) is MemoryPolicy
    ours = MemoryPolicy(slots=3)
    assert Tracker(sam, ours).clip_policy is ours


def test_pruning_compares_the_encodings_that_the_network_has_now() -> None:
    sam = build_sam(ModelSpec("hiera_nano", image_size=64))
    policy = make_policy(MemorySettings(policy="pruned"), sam)
    assert isinstance(policy, PrunedPolicy) and policy.encoding is sam.maskmem_tpos_enc
