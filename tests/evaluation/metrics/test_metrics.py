"""What a row holds: overlaps from counts, what was asked for, and what is defined where a score is undefined."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError

from medsam2.evaluation.metrics.metrics import Scores, dice, score
from medsam2.evaluation.settings import MetricSettings

UNIT = (1.0, 1.0, 1.0)
ALL_METRICS = MetricSettings(tubes=("*",), instances=("*",))
AGREEMENT = ("dsc", "iou", "nsd", "cldice", "instance_f1")  # 1 is perfect, 0 the worst
MASKS = arrays(bool, (3, 6, 7))


@pytest.mark.parametrize("volume", [True, False])
def test_both_empty_is_perfect_in_every_score(volume: bool) -> None:
    empty = np.zeros((3, 8, 8), bool)
    scores = score(empty, empty, UNIT, volume, settings=ALL_METRICS)
    assert [getattr(scores, name) for name in AGREEMENT] == [1.0] * 5
    assert (scores.hd95, scores.assd, scores.volume_error) == (0.0, 0.0, 0.0)
    if not volume:
        assert (scores.j, scores.f, scores.jf) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("volume", [True, False])
@pytest.mark.parametrize("missed", [True, False])
def test_one_empty_is_the_worst_in_every_score(volume: bool, missed: bool) -> None:
    empty, full = np.zeros((3, 8, 8), bool), np.zeros((3, 8, 8), bool)
    full[:, 2:6, 2:6] = True
    prediction, truth = (empty, full) if missed else (full, empty)
    scores = score(prediction, truth, (5.0, 2.0, 3.0), volume, settings=ALL_METRICS)
    assert [getattr(scores, name) for name in AGREEMENT] == [0.0] * 5
    diagonal = math.hypot(10, 14, 21) if volume else math.hypot(14, 21)
    assert scores.hd95 == pytest.approx(diagonal) and scores.assd == pytest.approx(diagonal)
    assert scores.volume_error == -1.0 if missed else math.isnan(scores.volume_error)
    if not volume:
        assert (scores.j, scores.f, scores.jf) == (0.0, 0.0, 0.0)


def test_overlap_counts_empty_slices_and_equals_the_definition() -> None:
    truth, prediction = np.zeros((4, 10, 10), bool), np.zeros((4, 10, 10), bool)
    truth[1, :4, :5] = True
    prediction[1, 2:6, :5] = True
    prediction[3, 0, :10] = True  # a false positive on a slice without the object
    assert dice(prediction, truth) == pytest.approx(2 * 10 / (20 + 30))
    scores = score(prediction, truth, UNIT, True, prompted=(1,))
    assert scores.dsc == pytest.approx(0.4) and scores.iou == pytest.approx(0.25)
    assert scores.prompt_dsc == pytest.approx(2 * 10 / 40)
    assert scores.other_dsc == 0.0
    assert scores.present_dsc == pytest.approx(0.5) and scores.present_iou == pytest.approx(1 / 3)
    assert scores.volume_error == pytest.approx(0.5)
    assert scores.absent_empty_share == pytest.approx(2 / 3) and scores.absent_all_empty is False
    assert (scores.voxels, scores.voxels_predicted, scores.voxels_both) == (20, 30, 10)


def test_without_settings_only_overlaps_are_computed() -> None:
    truth = np.ones((2, 5, 5), bool)
    scores = score(truth, truth, UNIT, False, prompted=(0, 1), structure="vessel")
    unknown = {name for name, value in asdict(scores).items() if isinstance(value, float) and math.isnan(value)}
    assert unknown == {
        "nsd", "hd95", "assd", "f", "jf", "cldice", "instance_f1", "other_dsc", "absent_empty_share",
    }  # fmt: skip
    assert scores.absent_all_empty is None and scores.prompt_dsc == 1.0 and scores.j == 1.0


def test_tubes_and_instances_are_scored_only_where_their_name_asks_for_it() -> None:
    truth = np.zeros((2, 12, 12), bool)
    truth[:, 3:8, 3:8] = True
    asked = MetricSettings(surfaces=False, tubes=("*vessel*",), instances=("nuclei",))
    vessel = score(truth, truth, UNIT, True, settings=asked, structure="left vessel tree")
    nuclei = score(truth, truth, UNIT, True, settings=asked, structure="nuclei")
    assert vessel.cldice == 1.0 and math.isnan(vessel.instance_f1)
    assert nuclei.instance_f1 == 1.0 and math.isnan(nuclei.cldice)
    assert math.isnan(vessel.nsd) and math.isnan(vessel.hd95)


def test_the_tolerance_of_a_structure_decides_its_surface_dice() -> None:
    truth = np.zeros((1, 30, 30), bool)
    truth[0, 5:20, 5:20] = True
    shifted = np.roll(truth, 3, 1)
    wide = MetricSettings(nsd_px=1.0, tolerances={"lens*": 3.0, "*": 1.0})
    assert score(shifted, truth, UNIT, False, settings=wide, structure="lens capsule").nsd == 1.0
    assert score(shifted, truth, UNIT, False, settings=wide, structure="iris").nsd == pytest.approx(0.5)


def test_the_first_pattern_that_fits_gives_the_tolerance_and_none_gives_the_unit_s_own() -> None:
    metrics = MetricSettings(nsd_mm=2.0, nsd_px=5.0, tolerances={"kidney": 3.0, "kid*": 4.0})
    assert metrics.tolerance("kidney", True) == 3.0 and metrics.tolerance("kids", False) == 4.0
    assert metrics.tolerance("Kidney", True) == 2.0 and metrics.tolerance("Kidney", False) == 5.0


@pytest.mark.parametrize("wrong", [{"nsd_mm": -1.0}, {"tolerances": {"a": -0.1}}, {"nsd_px": math.inf}, {"nsd": 1.0}])
def test_a_tolerance_that_is_none_is_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        MetricSettings(**wrong)


@given(prediction=MASKS, truth=MASKS, volume=st.booleans())
@settings(max_examples=30, deadline=None)
def test_agreement_is_symmetric_bounded_and_perfect_only_with_itself(
    prediction: np.ndarray, truth: np.ndarray, volume: bool
) -> None:
    there = score(prediction, truth, (3.0, 1.0, 2.0), volume, settings=ALL_METRICS)
    back = score(truth, prediction, (3.0, 1.0, 2.0), volume, settings=ALL_METRICS)
    for name in (*AGREEMENT, "hd95", "assd", *(() if volume else ("j", "f"))):
        assert getattr(there, name) == pytest.approx(getattr(back, name), abs=1e-9), name
    assert all(0 <= getattr(there, name) <= 1 for name in AGREEMENT)
    assert there.iou == pytest.approx(there.dsc / (2 - there.dsc))
    assert (there.dsc == 1.0) == np.array_equal(prediction, truth)
    alike = score(truth, truth, (3.0, 1.0, 2.0), volume, settings=ALL_METRICS)
    assert [getattr(alike, name) for name in AGREEMENT] == [1.0] * 5 and alike.hd95 == alike.assd == 0.0


@given(prediction=MASKS, truth=MASKS)
@settings(max_examples=30, deadline=None)
def test_pooled_counts_give_the_overlaps_back(prediction: np.ndarray, truth: np.ndarray) -> None:
    scores = score(prediction, truth, UNIT, True)
    total = scores.voxels + scores.voxels_predicted
    assert scores.dsc == pytest.approx(2 * scores.voxels_both / total if total else 1.0)


def test_scores_are_plain_numbers_that_a_table_takes() -> None:
    truth = np.ones((3, 6, 6), bool)
    values = asdict(score(truth, truth, UNIT, False, settings=ALL_METRICS))
    assert {type(value) for value in values.values()} <= {float, int, bool, type(None)}
    assert list(values) == [*Scores.__dataclass_fields__]


@pytest.mark.parametrize("corner", [(0, 0), (9, 30), (14, 47)])
@pytest.mark.parametrize("volume", [True, False])
def test_scores_are_those_of_the_whole_image_although_only_a_part_is_looked_at(
    volume: bool, corner: tuple[int, int]
) -> None:
    from medsam2.evaluation.metrics.metrics import boundary_f
    from medsam2.evaluation.metrics.surfaces import surface_scores

    y, x = corner  # at the border, inside, and at the opposite border
    truth, prediction = np.zeros((4, 20, 55), bool), np.zeros((4, 20, 55), bool)
    truth[1:3, y : y + 6, x : x + 8] = True
    prediction[1, y + 1 : y + 5, x : x + 8] = prediction[3, 2:4, 2:4] = True
    scores = score(prediction, truth, (4.0, 1.0, 2.0), volume, settings=ALL_METRICS)
    whole = surface_scores(prediction, truth, (4.0, 1.0, 2.0), 2.0, volume)
    assert (scores.nsd, scores.hd95, scores.assd) == pytest.approx((whole.nsd, whole.hd95, whole.assd))
    if not volume:
        assert scores.f == pytest.approx(boundary_f(prediction, truth))
