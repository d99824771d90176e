"""What is left of the score on damaged images: sums checked by hand, pairs, intervals, tables, curves."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from medsam2.errors import UserError
from medsam2.evaluation.report.report import draw_robustness
from medsam2.evaluation.report.tables import corruption_title, robustness_table
from medsam2.evaluation.statistics.robustness import summarise

Scores = dict[tuple[str, int], list[float]]


def _rows(scores: dict[str, Scores], patients: list[str] | None = None, modality: str = "CT") -> pd.DataFrame:
    """Rows of {checkpoint: {(corruption, severity): DSC per object}}; one patient per object by default."""
    rows = []
    for label, by_severity in scores.items():
        for (corruption, severity), values in by_severity.items():
            for number, dsc in enumerate(values):
                rows.append(
                    {
                        "checkpoint": label, "protocol": "p", "dataset": "d", "modality": modality,
                        "case": f"case{number}", "patient": patients[number] if patients else f"patient{number}",
                        "object": 0, "corruption": corruption, "severity": severity, "dsc": dsc,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def _entry(summary: list[dict], corruption: str, suite: str | None = None) -> dict:
    (match,) = [e for e in summary if e["corruption"] == corruption and suite in (None, e["suite"])]
    return match


CLEAN, ONE, TWO = ("", 0), ("low_dose", 1), ("low_dose", 2)


def test_drop_and_errors_are_the_sums_that_their_definition_says() -> None:
    first: Scores = {CLEAN: [0.9, 0.7], ONE: [0.8, 0.6], TWO: [0.5, 0.3]}
    second: Scores = {CLEAN: [0.9, 0.9], ONE: [0.9, 0.8], TWO: [0.8, 0.7]}
    (entry,) = summarise(_rows({"a": first, "b": second}), ["a", "b"])
    assert (entry["corruption"], entry["suite"], entry["severities"]) == ("low_dose", "medical", [1, 2])
    assert entry["clean"]["a"] == pytest.approx(0.8)
    assert entry["dsc"]["a"] == pytest.approx([0.7, 0.4])
    assert entry["mean"]["a"] == pytest.approx(0.55)
    assert entry["drop"]["a"]["mean"] == pytest.approx(0.25)
    assert entry["relative_drop"]["a"] == pytest.approx(0.25 / 0.8)
    assert entry["error"]["a"] == pytest.approx(100)
    assert entry["error"]["b"] == pytest.approx(100 * (0.15 + 0.25) / (0.3 + 0.6))
    assert entry["drop"]["a"]["low"] is None  # two patients
    assert (entry["cases"], entry["patients"], entry["objects"], entry["left_out"]) == (2, 2, 2, 0)


def test_a_patient_with_many_objects_counts_once() -> None:
    scores = {"a": {CLEAN: [1.0, 0.8, 0.4], ONE: [0.6, 0.4, 0.4]}}
    (entry,) = summarise(_rows(scores, ["p", "p", "q"]), ["a"])
    assert entry["clean"]["a"] == pytest.approx((0.9 + 0.4) / 2)
    assert entry["drop"]["a"]["mean"] == pytest.approx((0.4 + 0.0) / 2)


def test_intervals_hold_the_mean_and_shrink_with_more_patients() -> None:
    generator = np.random.default_rng(0)

    def span(count: int) -> dict:
        clean = generator.uniform(0.7, 0.95, count)
        damaged = clean - generator.uniform(0.05, 0.35, count)
        (entry,) = summarise(_rows({"a": {CLEAN: list(clean), ONE: list(damaged)}}), ["a"])
        return entry["drop"]["a"]

    few, many = span(10), span(200)
    for interval in (few, many):
        assert interval["low"] < interval["mean"] < interval["high"]
    assert many["high"] - many["low"] < 0.6 * (few["high"] - few["low"])


def test_the_same_seed_gives_the_same_interval() -> None:
    values = list(np.random.default_rng(1).uniform(0.2, 0.9, 12))
    rows = _rows({"a": {CLEAN: [0.95] * 12, ONE: values}})
    assert summarise(rows, ["a"], seed=3) == summarise(rows, ["a"], seed=3)
    assert summarise(rows, ["a"], seed=3) != summarise(rows, ["a"], seed=4)


def test_clean_scores_are_of_the_cases_that_the_corruption_was_tried_on() -> None:
    scans = _rows({"a": {CLEAN: [0.5], ONE: [0.4]}}, ["scan"])
    clips = _rows({"a": {CLEAN: [0.9], ("smoke", 1): [0.3]}}, ["clip"], "ENDOSCOPY").assign(dataset="e")
    summary = summarise(pd.concat([scans, clips]), ["a"])
    assert _entry(summary, "low_dose")["clean"]["a"] == pytest.approx(0.5)
    assert _entry(summary, "smoke")["clean"]["a"] == pytest.approx(0.9)
    total = _entry(summary, "all", "all")
    assert total["clean"]["a"] == pytest.approx(0.7) and total["drop"]["a"]["mean"] == pytest.approx((0.1 + 0.6) / 2)
    assert total["patients"] == 2


def test_an_object_without_all_of_its_scores_is_left_out_and_counted() -> None:
    rows = _rows({"a": {CLEAN: [0.9, 0.9, 0.1], ONE: [0.8, 0.7, 0.1], TWO: [0.7, 0.6]}})
    (entry,) = summarise(rows, ["a"])
    assert entry["clean"]["a"] == pytest.approx(0.9)
    assert (entry["patients"], entry["left_out"]) == (2, 1)


def test_totals_follow_their_suites_and_average_the_errors() -> None:
    first: Scores = {CLEAN: [0.9], ONE: [0.7], ("fog", 1): [0.5], ("snow", 1): [0.8]}
    second: Scores = {CLEAN: [0.9], ONE: [0.4], ("fog", 1): [0.75], ("snow", 1): [0.9]}
    summary = summarise(_rows({"a": first, "b": second}), ["a", "b"])
    assert [(e["corruption"], e["suite"]) for e in summary] == [
        ("snow", "imagenet_c"), ("fog", "imagenet_c"), ("low_dose", "medical"), ("all", "imagenet_c"), ("all", "all"),
    ]  # fmt: skip
    assert _entry(summary, "all", "imagenet_c")["error"]["b"] == pytest.approx((50 + 50) / 2)
    assert _entry(summary, "all", "all")["error"]["b"] == pytest.approx((200 + 50 + 50) / 3)
    assert [corruption_title(entry) for entry in summary][2:] == ["low dose", "all of ImageNet-C", "all corruptions"]


def test_what_has_no_ratio_is_null_and_the_rest_is_json() -> None:
    rows = _rows({"a": {CLEAN: [0.0] * 4, ONE: [0.0] * 4}, "b": {CLEAN: [1.0] * 4, ONE: [1.0] * 4}})
    (entry,) = summarise(rows, ["b", "a"])
    assert entry["error"]["a"] is None  # the first checkpoint makes no error
    assert entry["relative_drop"]["a"] is None
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry


def test_without_damage_there_is_nothing_and_without_the_clean_ones_an_error() -> None:
    rows = _rows({"a": {CLEAN: [0.9], ONE: [0.8]}})
    assert summarise(rows[rows["corruption"] == ""], ["a"]) == []
    with pytest.raises(UserError, match="low_dose.*evaluate the clean cases too"):
        summarise(rows[rows["corruption"] != ""], ["a"])


def test_the_table_has_a_line_for_each_corruption_and_checkpoint() -> None:
    values = [0.9, 0.8, 0.7, 0.6]
    scores: Scores = {CLEAN: values, ONE: [v - 0.1 for v in values], ("window_shift", 1): [v - 0.3 for v in values]}
    entries = summarise(_rows({"a": scores, "b": scores}), ["a", "b"])
    table = robustness_table({"protocol": {"name": "box"}, "robustness": entries})
    assert len(table.lines) == 6 and table.totals == {4, 5}
    assert table.lines[3] == ["window shift", "b", "4", "0.750", "0.450", "0.300 [0.300, 0.300]", "40.0", "100"]


def test_the_curves_have_a_panel_per_corruption_and_a_line_per_checkpoint() -> None:
    scores: Scores = {CLEAN: [0.9] * 3}
    for name in ("low_dose", "speckle", "window_shift", "contrast_shift", "thick_slices", "gaussian_noise"):
        scores |= {(name, severity): [0.9 - 0.1 * severity] * 3 for severity in range(1, 6)}
    data = draw_robustness(summarise(_rows({"one": scores, "two": scores}), ["one", "two"]))
    assert data.startswith(b"\x89PNG") and len(data) > 10_000
