"""Scoring whole cases: one row per object, all objects of a case in one batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from medsam2.cases.case import Label
from medsam2.evaluation.loaded_case import LoadedCase
from medsam2.evaluation.metrics.metrics import Scores
from medsam2.evaluation.run.score_case import Row, predict_case, score_cases
from medsam2.evaluation.settings import MetricSettings, ProtocolSettings
from medsam2.inference.predictor import FrameResult, Predictor
from medsam2.model.build import load_model
from medsam2.model.tracker import Tracker


@pytest.fixture(scope="module")
def tracker(checkpoints: tuple[Path, Path]) -> Tracker:
    return Tracker(load_model(checkpoints[0]).sam)


def _case(objects: int = 2, kind: str = "volume", spacing: tuple[float, float, float] = (4.0, 0.5, 0.5)) -> LoadedCase:
    planes = np.zeros((1, 6, 40, 48), np.uint8)
    for value in range(1, objects + 1):
        planes[0, 1:4, 2 + value : 6 + value, 3 * value : 3 * value + 2] = value
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (6, 1, 40, 48), dtype=np.uint8))
    names = tuple(Label(value, f"part{value}") for value in range(1, objects + 1))
    return LoadedCase(frames, planes, names, spacing, kind, "CT", "demo", "c0", "", "hash")


class Widened(Predictor):
    """Gives every frame what the mask prompts show, one pixel too wide; notes its calls."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__(tracker)
        self.calls: list[int] = []

    def stream(self, frames, prompts, direction="both") -> Iterator[FrameResult]:  # type: ignore[no-untyped-def]
        masks = np.stack([prompt.mask | np.roll(prompt.mask, 1, 1) for prompt in prompts])
        self.calls.append(len(masks))
        for frame in range(len(frames)):
            logits = torch.from_numpy(np.where(masks, 1.0, -1.0))
            yield FrameResult(frame, tuple(range(len(masks))), logits, torch.zeros(len(masks)))


MASK = ProtocolSettings(name="p", prompt="mask")


def test_rows_say_what_was_scored(tracker: Tracker) -> None:
    rows = score_cases(tracker, [_case()], ProtocolSettings(name="p"), MetricSettings())
    assert [(row.structure, row.object, row.frames, row.voxels) for row in rows] == [
        ("part1", 0, 6, 24), ("part2", 1, 6, 24),
    ]  # fmt: skip
    assert rows[0].prompt_frames == "1" and rows[0].patient == "c0"  # no patient known: the case stands for one
    assert 0 <= rows[0].dsc <= 1 and 0 <= rows[0].nsd <= 1 and rows[0].seconds > 0
    assert (rows[0].clicks, rows[0].iou_by_clicks) == (0, "") and math.isnan(rows[0].noc90)


def test_a_row_holds_every_score_and_its_peak_memory(tracker: Tracker) -> None:
    (row,) = score_cases(tracker, [_case(1)], MASK)
    assert isinstance(row, Row) and set(Scores.__dataclass_fields__) < set(vars(row))
    assert math.isnan(row.peak_mb) or row.peak_mb > 50  # a process that has torch in memory holds more than that


def test_without_metric_settings_the_surface_dice_is_left_out(tracker: Tracker) -> None:
    (row,) = score_cases(tracker, [_case(1)], ProtocolSettings(name="p"))
    assert math.isnan(row.nsd)


def test_many_objects_are_predicted_in_batches_and_each_is_scored_against_its_own_truth(tracker: Tracker) -> None:
    case = _case(15)
    case = LoadedCase(**{**vars(case), "objects": (*case.objects, *case.objects[:5])})
    predictor = Widened(tracker)
    predictions = list(predict_case(predictor, case, MASK))
    assert predictor.calls == [16, 4] and [one.row.object for one in predictions] == list(range(20))
    # of 6 frames each shows the three columns, the truth has two columns on three of them
    assert all(one.row.dsc == pytest.approx(2 * 24 / (24 + 6 * 4 * 3)) for one in predictions)
    assert all(np.array_equal(one.truth, case.mask(one.row.object)) for one in predictions)


@pytest.mark.parametrize(
    ("kind", "metrics", "exact"),
    [
        ("volume", MetricSettings(nsd_mm=0.5, nsd_px=0), True),
        ("volume", MetricSettings(nsd_mm=0.4, nsd_px=9), False),
        ("clip", MetricSettings(nsd_mm=0.4, nsd_px=1.0), True),
    ],
)
def test_volumes_have_their_tolerance_in_mm_and_clips_in_pixels(
    tracker: Tracker, kind: str, metrics: MetricSettings, exact: bool
) -> None:
    case = _case(1, kind)  # the prediction is one pixel too wide: 0.5 mm
    protocol = MASK.model_copy(update={"reach": "object"})
    (prediction,) = predict_case(Widened(tracker), case, protocol, metrics)
    assert (prediction.row.nsd == 1.0) is exact


@pytest.mark.parametrize(
    ("scored", "frames", "dsc"), [("all", 6, 48 / 96), ("present", 3, 48 / 60), ("inner", 4, 48 / 72)]
)
def test_only_the_frames_that_the_protocol_names_are_scored(
    tracker: Tracker, scored: str, frames: int, dsc: float
) -> None:
    protocol = MASK.model_copy(update={"scored": scored, "slices": "last"})
    (prediction,) = predict_case(Widened(tracker), _case(1), protocol)
    row = prediction.row
    assert (row.frames, row.scored_frames) == (6, frames) and row.dsc == pytest.approx(dsc)
    assert row.prompt_frames == "3" and row.prompt_dsc == pytest.approx(16 / 20)
    assert len(prediction.prediction) == 6  # pictures see everything


def test_training_mode_survives_validation(tracker: Tracker) -> None:
    tracker.train()
    score_cases(tracker, [_case(1)], ProtocolSettings(name="p"))
    assert tracker.training
