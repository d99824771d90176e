"""Correction rounds: a fake model with known answers shows where each click goes and when the rounds end."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medsam2.evaluation.protocol.protocols import Target
from medsam2.evaluation.run.interactive import (
    Attempt,
    ImagePredictor,
    PackedMask,
    candidate_selection,
    format_history,
    next_click,
    number_of_clicks,
    predict_objects,
)
from medsam2.evaluation.run.score_case import measure_cost
from medsam2.evaluation.settings import Corrections, ProtocolSettings
from medsam2.inference.predictor import FramePrompt, FrameResult, Predictor
from medsam2.model.build import load_model
from medsam2.model.memory_bank import MemoryBank
from medsam2.model.tracker import Tracker
from medsam2.prompts.kinds import Prompts

SIDE = 32


class Squares:
    """A model that paints a square of 5 pixels around each positive click and clears one around each negative one.

    Boxes and masks are painted as they are; a frame without a prompt repeats the nearest prompted one.
    """

    tracker: Any = None

    def __init__(self) -> None:
        self.sessions: list[SquareSession] = []

    @property
    def calls(self) -> list[tuple[str, int]]:
        """The calls in order: "prompt" or "propagate", and the number of objects."""
        return [call for session in self.sessions for call in session.calls]

    def session(self, frames: Any) -> SquareSession:
        self.sessions.append(SquareSession(len(frames)))
        return self.sessions[-1]

    def stream(self, frames: Any, prompts: list[FramePrompt], direction: str) -> Iterator[FrameResult]:
        session = self.session(frames)
        session.prompt(prompts)
        yield from session.propagate(direction)


class SquareSession:
    """One clip: prompts on a tracked frame change its mask; on another frame they start from an empty mask."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.tracks: dict[int, dict[int, np.ndarray]] = {}  # object -> prompted frame -> mask
        self.tracked: dict[tuple[int, int], np.ndarray] = {}  # (object, frame) -> mask
        self.calls: list[tuple[str, int]] = []

    def prompt(self, prompts: list[FramePrompt]) -> list[FrameResult]:
        self.calls.append(("prompt", len({prompt.object for prompt in prompts})))
        places = sorted({(prompt.frame, prompt.object) for prompt in prompts})
        for frame, number in places:
            own = [prompt for prompt in prompts if (prompt.frame, prompt.object) == (frame, number)]
            mask = self.tracked.get((number, frame), np.zeros((SIDE, SIDE), bool))
            self.tracks.setdefault(number, {})[frame] = _paint(mask, own)
            if (number, frame) in self.tracked:
                self.tracked[number, frame] = self.tracks[number][frame]
        frames = sorted({frame for frame, _ in places})
        return [self._result(frame, [number for at, number in places if at == frame]) for frame in frames]

    def propagate(self, direction: str) -> Iterator[FrameResult]:
        self.calls.append(("propagate", len(self.tracks)))
        for frame in range(self.length):
            for number, prompted in self.tracks.items():
                near = min(prompted, key=lambda at: abs(at - frame))
                self.tracked[number, frame] = prompted[near]
            yield self._result(frame, sorted(self.tracks))

    def _result(self, frame: int, numbers: list[int]) -> FrameResult:
        masks = [self.tracks[n].get(frame, self.tracked.get((n, frame))) for n in numbers]
        logits = torch.from_numpy(np.where(np.stack(masks), 1.0, -1.0))  # type: ignore[arg-type]
        return FrameResult(frame, tuple(numbers), logits, torch.zeros(len(numbers)))


def _paint(mask: np.ndarray, prompts: list[FramePrompt]) -> np.ndarray:
    mask = mask.copy()
    for prompt in prompts:
        if prompt.mask is not None:
            mask = prompt.mask.copy()
        if prompt.box is not None:
            x0, y0, x1, y1 = (int(side) for side in prompt.box)
            mask[y0 : y1 + 1, x0 : x1 + 1] = True
        for (x, y), label in zip(*(np.rint(values).astype(int) for values in _points(prompt)), strict=True):
            mask[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3] = label == 1
    return mask


def _points(prompt: FramePrompt) -> tuple[np.ndarray, np.ndarray]:
    if prompt.points is None or prompt.labels is None:
        return np.zeros((0, 2)), np.zeros(0)
    return prompt.points, prompt.labels


def _frames(count: int) -> torch.Tensor:
    return torch.zeros(count, 1, SIDE, SIDE, dtype=torch.uint8)


def _square(x: int, y: int, side: int = 5) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[y : y + side, x : x + side] = True
    return mask


def _run(truth: np.ndarray, model: Squares | None = None, **settings: Any) -> Attempt:
    protocol = ProtocolSettings(name="p", **settings)
    (attempt,) = predict_objects(model or Squares(), _frames(len(truth)), [Target(truth)], protocol)  # type: ignore[arg-type]
    return attempt


# ------------------------------------------------------------------------------------------------ where to click


def test_a_click_goes_to_the_deepest_point_of_the_deeper_error() -> None:
    truth, prediction = _square(2, 2, 9), _square(20, 20, 5)
    click = next_click(prediction, truth)
    assert click is not None and (click.point, click.label, click.depth) == ((6.0, 6.0), 1, 5.0)
    click = next_click(_square(20, 20, 11) | _square(2, 2, 9), truth)
    assert click is not None and (click.point, click.label, click.depth) == ((25.0, 25.0), 0, 6.0)


def test_of_equal_errors_the_missed_one_is_clicked_and_without_error_none() -> None:
    click = next_click(_square(20, 20), _square(2, 2))
    assert click is not None and click.label == 1
    assert next_click(_square(2, 2), _square(2, 2)) is None


def test_an_error_at_the_border_is_not_deeper_for_lying_there() -> None:
    click = next_click(np.zeros((SIDE, SIDE), bool), _square(0, 0, 5))
    assert click is not None and click.point == (2.0, 2.0) and click.depth == 3.0


@pytest.mark.parametrize(("level", "clicks"), [(0.5, 1), (0.8, 3), (0.95, 21)])
def test_the_number_of_clicks_is_the_first_that_reaches_the_level_or_all_allowed(level: float, clicks: int) -> None:
    assert number_of_clicks([(1, 0.6), (2, 0.7), (3, 0.9)], level, max_corrections=20) == clicks
    assert math.isnan(number_of_clicks([], level, max_corrections=20))


# --------------------------------------------------------------------------------------- rounds on prompted frames


def test_corrections_on_the_prompted_frame_add_what_is_missing_and_then_end() -> None:
    truth = np.stack([np.zeros((SIDE, SIDE), bool), _square(3, 3) | _square(20, 20), _square(3, 3)])
    rules = Corrections(most=5)
    attempt = _run(truth, slices="largest", prompt="deepest", direction="both", corrections=rules)
    assert format_history(attempt.iou_history) == "1:0.5000 2:1.0000"
    assert attempt.clicks == 2 and attempt.prompted == (1,)
    assert sorted(tuple(p.points[0]) for p in attempt.prompts if p.points is not None) == [(5, 5), (22, 22)]
    assert np.array_equal(attempt.mask.dense()[1], truth[1])
    assert np.array_equal(attempt.mask.dense()[2], truth[1])  # the fake model repeats its mask


def test_what_is_too_much_gets_a_negative_click() -> None:
    truth = (_square(0, 0, 13) & ~_square(4, 4))[None]  # its box covers a hole of 5 pixels
    attempt = _run(truth, prompt="box", corrections=Corrections(most=3))
    assert attempt.iou_history[-1] == (1, 1.0) and np.array_equal(attempt.mask.frame(0), truth[0])


def test_clicks_end_at_the_most_at_the_quality_and_at_the_depth() -> None:
    truth = (_square(0, 0) | _square(9, 0) | _square(18, 0) | _square(0, 10))[None]
    assert _run(truth, prompt="deepest", corrections=Corrections(most=2)).clicks == 3
    assert _run(truth, prompt="deepest", corrections=Corrections(most=9, until=0.5)).clicks == 2
    assert _run(truth, prompt="deepest", corrections=Corrections(most=9, depth=3.0)).clicks == 1
    assert _run(truth, prompt="deepest", corrections=Corrections(most=9, depth=2.9)).clicks == 4


def test_of_several_prompted_frames_the_worse_one_is_clicked() -> None:
    truth = np.stack([_square(3, 3), _square(3, 3) | _square(20, 20, 6), _square(3, 3)])
    attempt = _run(truth, slices="every", prompt="click", direction="alone", corrections=Corrections(most=1))
    assert [prompt.frame for prompt in attempt.prompts] == [0, 1, 2, 1]


def test_a_frame_is_encoded_once_for_all_its_rounds() -> None:
    model = Squares()
    truth = (_square(3, 3) | _square(20, 20) | _square(3, 20))[None]
    _run(truth, model, prompt="deepest", direction="alone", corrections=Corrections(most=5))
    assert len(model.sessions) == 1 and len(model.calls) == 3


# --------------------------------------------------------------------------------------- rounds on the worst frame


def test_the_worst_frame_is_corrected_from_its_propagated_mask() -> None:
    truth = np.stack([_square(3, 3), _square(3, 3), _square(3, 3) | _square(20, 20)])
    attempt = _run(
        truth, slices="first", prompt="deepest", direction="forward", corrections=Corrections(most=4, where="worst")
    )
    _, click = attempt.prompts
    assert click.frame == 2 and click.points is not None and tuple(click.points[0]) == (22, 22)
    assert [clicks for clicks, _ in attempt.iou_history] == [1, 2] and attempt.iou_history[-1][1] == 1.0
    assert attempt.prompted == (0, 2) and np.array_equal(attempt.mask.dense(), truth)


def test_a_round_has_several_clicks_before_everything_is_predicted_again() -> None:
    truth = np.stack([_square(3, 3) | _square(14, 3) | _square(3, 20)] * 2)
    model = Squares()
    attempt = _run(
        truth, model, slices="first", prompt="deepest", direction="forward",
        corrections=Corrections(most=8, where="worst", each=3),
    )  # fmt: skip
    assert attempt.iou_history == [(3, 1.0)]
    assert [kind for kind, _ in model.calls] == ["prompt", "prompt", "prompt", "propagate"]


def test_an_object_that_is_done_is_not_predicted_again() -> None:
    truths = [_square(3, 3)[None], (_square(3, 20) | _square(20, 20))[None]]
    model = Squares()
    protocol = ProtocolSettings(name="p", prompt="deepest", corrections=Corrections(most=5, where="worst"))
    attempts = predict_objects(model, _frames(1), [Target(truth) for truth in truths], protocol)  # type: ignore[arg-type]
    assert [attempt.clicks for attempt in attempts] == [1, 2]
    assert model.calls == [("prompt", 2), ("propagate", 2), ("prompt", 1), ("propagate", 1)]
    assert all(np.array_equal(a.mask.dense(), truth) for a, truth in zip(attempts, truths, strict=True))


# -------------------------------------------------------------------------------------------- parts, alone, reach


def test_several_boxes_are_predicted_apart_and_joined() -> None:
    truth = np.stack([_square(3, 3) | _square(20, 20), np.zeros((SIDE, SIDE), bool)])
    model = Squares()
    attempt = _run(truth, model, prompt="boxes", number=5, direction="alone")
    assert model.calls == [("prompt", 2)]
    assert np.array_equal(attempt.mask.dense(), truth)


def test_alone_every_prompted_frame_is_a_picture_and_the_rest_is_empty() -> None:
    truth = np.stack([_square(3, 3), np.zeros((SIDE, SIDE), bool), _square(9, 9)])
    model = Squares()
    attempt = _run(truth, model, slices="every", direction="alone")
    assert [session.length for session in model.sessions] == [1, 1]
    assert np.array_equal(attempt.mask.dense(), truth)


def test_outside_of_the_marked_range_nothing_is_predicted() -> None:
    truth = np.stack([np.zeros((SIDE, SIDE), bool), _square(3, 3), _square(3, 3), np.zeros((SIDE, SIDE), bool)])
    assert _run(truth, reach="clip").mask.dense().any((1, 2)).all()
    assert np.array_equal(_run(truth, reach="object").mask.dense(), truth)


def test_packed_masks_keep_odd_sizes_and_join() -> None:
    masks = np.random.default_rng(0).random((2, 5, 7)) > 0.5
    packed = PackedMask((3, 5, 7))
    packed.add(1, masks[0])
    packed.add(1, masks[1])
    assert np.array_equal(packed.frame(1), masks[0] | masks[1])
    assert np.array_equal(
        packed.dense(), np.stack([np.zeros((5, 7), bool), masks[0] | masks[1], np.zeros((5, 7), bool)])
    )


# ------------------------------------------------------------------------------------------------ with the network


@pytest.fixture(scope="module")
def tracker(checkpoints: tuple[Path, Path]) -> Tracker:
    return Tracker(load_model(checkpoints[0]).sam).eval()


def test_a_frame_alone_is_what_the_whole_gives_on_its_prompted_frame(tracker: Tracker) -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 1, SIDE, SIDE), dtype=np.uint8))
    truth = np.stack([_square(8, 8, 12)] * 3)
    protocol = ProtocolSettings(name="p", slices="middle", prompt="click")
    protocols = [protocol.model_copy(update={"direction": direction}) for direction in ("alone", "both")]
    alone, propagated = (predict_objects(Predictor(tracker), frames, [Target(truth)], p)[0].mask for p in protocols)
    assert np.array_equal(alone.frame(1), propagated.frame(1))
    assert not alone.frame(0).any() and not alone.frame(2).any()


def test_the_rounds_end_with_what_all_prompts_together_give(tracker: Tracker) -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (2, 1, SIDE, SIDE), dtype=np.uint8))
    truth = np.stack([_square(8, 8, 12) | _square(24, 3), np.zeros((SIDE, SIDE), bool)])
    protocol = ProtocolSettings(name="p", prompt="click", direction="alone", corrections=Corrections(most=3))
    (attempt,) = predict_objects(Predictor(tracker), frames, [Target(truth)], protocol)
    ((_, frame, mask),) = ImagePredictor(Predictor(tracker), frames).predict(attempt.prompts)
    assert attempt.clicks == 4 and [clicks for clicks, _ in attempt.iou_history] == [1, 2, 3, 4]
    assert frame == 0 and np.array_equal(attempt.mask.frame(0), mask)


def test_corrections_of_tracked_frames_run_on_the_network_for_several_objects(tracker: Tracker) -> None:
    frames = torch.from_numpy(np.random.default_rng(1).integers(0, 255, (4, 1, SIDE, SIDE), dtype=np.uint8))
    truths = [np.stack([_square(x, 8, 9)] * 4) for x in (3, 18)]
    rules = Corrections(most=3, where="worst", each=2)
    protocol = ProtocolSettings(name="p", slices="first", prompt="deepest", direction="forward", corrections=rules)
    attempts = predict_objects(Predictor(tracker), frames, [Target(truth) for truth in truths], protocol)
    for attempt in attempts:  # random weights never get it right: one click with the prompt, two on the worst frame
        assert [clicks for clicks, _ in attempt.iou_history] == [2, 4] and attempt.corrected == 3
        assert all(frame in attempt.mask for frame in range(4))


def test_the_first_candidate_is_selected_only_inside_the_context(checkpoints: tuple[Path, Path]) -> None:
    tracker = Tracker(load_model(checkpoints[0]).sam).eval()
    with torch.no_grad():
        tracker.sam.sam_mask_decoder.pred_obj_score_head.layers[-1].bias += 100.0  # absent objects have no mask
        tracker.sam.sam_mask_decoder.iou_prediction_head.layers[-1].bias[3] += 5.0  # the last candidate seems best
        features = tracker.encode(torch.randn(6, 3, 128, 128, generator=torch.Generator().manual_seed(0)))

    def selected() -> list[int]:
        prompts = Prompts(torch.full((6, 1, 2), 40.0), torch.ones(6, 1, dtype=torch.int32))
        with torch.no_grad():
            decoded = tracker.segment(features, MemoryBank(), 0, prompts)
        return [int(place) for place in (decoded.all_logits == decoded.logits).flatten(2).all(2).long().argmax(1)]

    assert selected() == [2] * 6
    with candidate_selection(tracker, "first"):
        assert selected() == [0] * 6
    with candidate_selection(tracker, "best"):
        assert selected() == [2] * 6


def test_peak_memory_is_of_what_happened_inside() -> None:
    size = 100_000_000
    with measure_cost(torch.device("cpu")) as large, mmap.mmap(-1, size) as block:  # malloc may use what it holds
        for start in range(0, size, mmap.PAGESIZE):
            block[start] = 1
    with measure_cost(torch.device("cpu")) as small:
        pass
    if math.isnan(large.peak_mb):
        pytest.skip("this system does not let a process reset its peak memory")
    assert large.peak_mb - small.peak_mb > 0.8 * size / 1e6
    assert large.seconds > small.seconds > 0
