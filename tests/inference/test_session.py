"""Corrections after propagation, objects that enter later, and what a frame costs, beside the official predictor."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from official_video import (
    HEIGHT,
    LENGTH,
    WIDTH,
    TorchWithFullMemory,
    begin,
    black_folder,
    carry,
    random_clip,
    say,
    two_models,
)
from torch.utils._python_dispatch import TorchDispatchMode

from medsam2.inference.predictor import FramePrompt, Predictor
from medsam2.model.policies import MemorySettings, make_policy
from medsam2.model.tracker import Tracker

START = 5
BOXES = [FramePrompt(START, 0, box=(20, 25, 55, 56)), FramePrompt(START, 1, box=(68, 30, 92, 60))]


@pytest.fixture(scope="module")
def models() -> tuple[Any, Tracker]:
    return two_models(add_all_frames_to_correct_as_cond=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return black_folder(tmp_path_factory.mktemp("frames"))


@pytest.fixture(autouse=True)
def exact_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["sam2.sam2_video_predictor"], "torch", TorchWithFullMemory())


def click(frame: int, index: int, *points: tuple[float, float], labels: tuple[int, ...] = (1,)) -> FramePrompt:
    return FramePrompt(frame, index, points=np.array(points, np.float32), labels=np.array(labels, np.int32))


def predictor_of(tracker: Tracker, **options: Any) -> Predictor:
    return Predictor(tracker, memory_dtype=torch.float32, **options)


def all_logits(results: Any, count: int) -> torch.Tensor:
    logits = torch.full((count, LENGTH, HEIGHT, WIDTH), -1024.0)
    for result in results:
        logits[list(result.objects), result.frame] = result.logits
    return logits


CORRECTIONS = {
    "a click on a tracked frame": [[click(12, i, (60, 50)) for i in (0, 1)]],
    "two rounds on a tracked frame": [[click(12, i, (60, 50)) for i in (0, 1)], [click(12, 0, (30, 20), labels=(0,))]],
    "a mask on a tracked frame": [[FramePrompt(9, i, mask=np.eye(HEIGHT, WIDTH, i * 30) > 0) for i in (0, 1)]],
    "the prompted frame again": [[click(START, i, (35 + 45 * i, 44)) for i in (0, 1)]],
    "a frame before the prompted one": [[click(2, i, (35 + 45 * i, 44)) for i in (0, 1)]],
}


@pytest.mark.parametrize("case", CORRECTIONS)
def test_correcting_after_propagation_equals_the_official_predictor(models, folder, case: str) -> None:
    official, tracker = models
    frames = random_clip()
    state, session = begin(official, folder, frames), predictor_of(tracker).session(frames)
    say(official, state, BOXES)
    session.prompt(BOXES)
    first, _ = carry(official, state, 2, "both")
    assert torch.allclose(all_logits(session.propagate("both"), 2), first, atol=1e-3)
    earlier = list(BOXES)
    for corrections in CORRECTIONS[case]:
        say(official, state, corrections, before=earlier)
        session.prompt(corrections)
        earlier += corrections
    expected, _ = carry(official, state, 2, "both")
    ours = all_logits(session.propagate("both"), 2)
    assert (expected - first).abs().max() > 0.1, "the correction changes nothing: the test would be idle"
    assert (ours - expected).abs().max() < 1e-3
    same, either = ((ours > 0) & (expected > 0)).sum().item(), ((ours > 0) | (expected > 0)).sum().item()
    assert same / either >= 0.999


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_an_object_that_enters_later_is_what_the_official_predictor_makes_of_it(models, folder, direction: str) -> None:
    official, tracker = models
    frames = random_clip()
    prompts = [BOXES[0], replace(BOXES[1], frame=13), click(9, 2, (60, 50)), click(16, 0, (50, 48))]
    prediction = predictor_of(tracker).predict(frames, prompts, direction, logits=True)
    for index in range(3):
        separate = [replace(prompt, object=0) for prompt in prompts if prompt.object == index]
        state = begin(official, folder, frames)
        say(official, state, separate)
        expected, visited = carry(official, state, 1, direction)
        assert (prediction.logits[index] - expected[0]).abs().max() < 1e-3
        assert torch.equal(~prediction.scores[index].isnan(), visited)


def test_a_new_object_in_a_session_leaves_the_others_alone(models) -> None:
    frames = random_clip()
    session, without = (predictor_of(models[1]).session(frames) for _ in range(2))
    for one in (session, without):
        one.prompt(BOXES[:1])
        all_logits(one.propagate("both"), 1)
    session.prompt([replace(BOXES[1], frame=14)])
    after, expected = all_logits(session.propagate("both"), 2), all_logits(without.propagate("both"), 1)
    assert torch.allclose(after[0], expected[0], atol=1e-3)
    alone = predictor_of(models[1]).predict(frames, [replace(BOXES[1], frame=14, object=0)], "both", logits=True)
    assert torch.allclose(after[1], alone.logits[0], atol=1e-3)


def operators(step: Callable[[], Any]) -> int:
    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counting.count += 1
            return func(*args, **(kwargs or {}))

    with Counting():
        step()
    return Counting.count


@pytest.mark.parametrize("spread", [False, True])
def test_a_frame_of_eight_objects_takes_a_third_of_the_official_operators(models, folder, spread: bool) -> None:
    official, tracker = models
    frames = random_clip()
    prompts = [FramePrompt(n if spread else 0, n, box=(8 * n, 25, 8 * n + 30, 56)) for n in range(8)]
    state = begin(official, folder, frames)
    say(official, state, prompts)
    theirs, ours = official.propagate_in_video(state), predictor_of(tracker).stream(frames, prompts, "forward")
    for _ in range(LENGTH - 2):
        next(theirs), next(ours)
    official._get_image_feature(state, LENGTH - 2, 1)  # encoding is left out on both sides
    with warnings.catch_warnings(), torch.backends.mkldnn.flags(enabled=False):  # the path that a GPU takes
        assert operators(lambda: next(ours)) <= operators(lambda: next(theirs)) / 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", ["sam2", *(pytest.param(p, marks=pytest.mark.slow) for p in ("pruned", "self_sorting"))]
)
def test_what_is_held_does_not_grow_with_the_clip(models, policy: str) -> None:
    tracker = models[1]

    class Endless:
        def __init__(self, length: int) -> None:
            self.length = length

        def __len__(self) -> int:
            return self.length

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.full((1, 32, 32), index % 200, dtype=torch.uint8)

    def held(length: int) -> list[int]:
        """Bytes of all tensors that live while the last frames of each pass are visited."""
        rule = make_policy(MemorySettings(policy=policy, capacity=6, confidence=0), tracker.sam)
        predictor = Predictor(tracker, cache_frames=4, policy=rule)
        prompts = [FramePrompt(length // 2 + n, n, box=(4, 4, 20, 20)) for n in range(2)]
        sizes = []
        for result in predictor.stream(Endless(length), prompts, "both"):
            if result.frame in (length - 1, 0):
                gc.collect()
                tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
                sizes.append(sum(t.nbytes for t in {t.data_ptr(): t for t in tensors}.values()))
        return sizes

    short, long = held(80), held(200)
    # which remembered images are still in the cache of features as well (and so counted once) depends on the clip: at
    # most 6 of 2 objects, 32 KiB each; the memories of 120 frames more would be 2 MB
    assert all(after <= before + 12 * 32 * 1024 for before, after in zip(short, long, strict=True))


@pytest.mark.parametrize("policy", ["pruned", "self_sorting"])
def test_a_policy_decides_for_each_object_as_if_it_were_alone(models, policy: str) -> None:
    tracker, frames = models[1], random_clip()
    rule = make_policy(MemorySettings(policy=policy, capacity=5, confidence=0.0), tracker.sam)
    predictor = predictor_of(tracker, policy=rule)
    together = predictor.predict(frames, BOXES, "both", logits=True).logits
    for index in range(2):
        alone = predictor.predict(frames, [replace(BOXES[index], object=0)], "both", logits=True).logits
        assert torch.allclose(together[index], alone[0], atol=1e-3)
    plain = predictor_of(tracker).predict(frames, BOXES, "both", logits=True).logits
    assert (together - plain).abs().max() > 0.1, "the policy changes nothing: the test would be idle"
