"""Scoring whole cases: one row an object, all objects of a case in one batch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from medsam2.evaluation.predictor import Prediction, Predictor
from medsam2.evaluation.quick import Tolerance, predict_case, score_cases
from medsam2.evaluation.settings import ProtocolSettings
from medsam2.evaluation.sources import CaseObject, LoadedCase
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
    names = tuple(CaseObject(f"part{value}", 0, value) for value in range(1, objects + 1))
    return LoadedCase(frames, planes, names, spacing, kind, "CT", "demo", "c0", "", "hash")


class Truthful(Predictor):
    """Gives the truth, one pixel too wide; counts its calls."""

    def __init__(self, case: LoadedCase) -> None:
        self.case, self.calls = case, 0

    def predict(self, frames, prompts, direction="both", logits=False) -> Prediction:  # type: ignore[no-untyped-def]
        count = 1 + max(prompt.object for prompt in prompts)
        first, self.calls = self.calls * 16, self.calls + 1
        masks = np.stack([self.case.mask(first + i) for i in range(count)])
        masks = masks | np.roll(masks, 1, 3)
        return Prediction(torch.from_numpy(masks), torch.zeros(masks.shape[:2]), None, len(frames))


def test_rows_say_what_was_scored(tracker: Tracker) -> None:
    rows = score_cases(tracker, [_case()], ProtocolSettings(name="p"), Tolerance())
    assert [(row.structure, row.object, row.frames, row.voxels) for row in rows] == [
        ("part1", 0, 6, 24), ("part2", 1, 6, 24),
    ]  # fmt: skip
    assert rows[0].prompt_frames == "1" and rows[0].patient == "c0"  # no patient known: the case stands for one
    assert 0 <= rows[0].dsc <= 1 and 0 <= rows[0].nsd <= 1 and rows[0].seconds > 0


def test_without_a_tolerance_the_surface_dice_is_left_out(tracker: Tracker) -> None:
    (row,) = score_cases(tracker, [_case(1)], ProtocolSettings(name="p"))
    assert math.isnan(row.nsd)


def test_many_objects_are_predicted_in_batches_and_each_is_scored_against_its_own_truth() -> None:
    case = _case(15)
    case = LoadedCase(**{**vars(case), "objects": (*case.objects, *case.objects[:5])})
    predictor = Truthful(case)
    found = list(predict_case(predictor, case, ProtocolSettings(name="p", prompt="mask"), Tolerance()))
    assert predictor.calls == 2 and len(found) == 20
    assert [one.row.object for one in found] == list(range(20))
    assert all(one.row.dsc == pytest.approx(2 * 2 / (2 + 3)) for one in found)


@pytest.mark.parametrize(("kind", "tolerance", "expected"), [("volume", Tolerance(0.5, 0), True),
                                                            ("volume", Tolerance(0.4, 9), False),
                                                            ("clip", Tolerance(0.4, 1.0), True)])  # fmt: skip
def test_volumes_have_their_tolerance_in_mm_and_clips_in_pixels(
    kind: str, tolerance: Tolerance, expected: bool
) -> None:
    case = _case(1, kind)  # the prediction is one pixel too wide: 0.5 mm
    (found,) = predict_case(Truthful(case), case, ProtocolSettings(name="p"), tolerance)
    assert (found.row.nsd == 1.0) is expected


def test_training_mode_survives_validation(tracker: Tracker) -> None:
    tracker.train()
    score_cases(tracker, [_case(1)], ProtocolSettings(name="p"))
    assert tracker.training
