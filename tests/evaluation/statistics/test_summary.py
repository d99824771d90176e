"""Means and changes over patients, other averages, sizes, and their intervals."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import numpy as np
import pandas as pd
import pytest

from medsam2.evaluation.statistics.intervals import Interval, mean_intervals
from medsam2.evaluation.statistics.summary import SCORES, size_classes, summarise


def _rows(scores: dict[str, list[tuple[str, str, float]]], **columns: Any) -> pd.DataFrame:
    """Rows of (patient, structure, dsc) by checkpoint; `columns` hold for all."""
    return pd.DataFrame(
        [
            {
                "checkpoint": label, "dataset": "d", "modality": "CT" if structure != "polyp" else "ENDOSCOPY",
                "structure": structure, "case": f"{patient}-{place}", "patient": patient, "object": 0, "dsc": dsc,
                "iou": dsc / (2 - dsc), "nsd": dsc / 2, "absent_empty_share": math.nan,
                "leak": label == "after" and patient == "p0", **columns,
            }
            for label, entries in scores.items()
            for place, (patient, structure, dsc) in enumerate(entries)
        ]
    )  # fmt: skip


def _interval(values: np.ndarray, seed: int, resamples: int) -> Interval:
    return mean_intervals(values[:, None], seed, resamples)[0]


def _find(groups: list[dict], **where: str) -> dict:
    (match,) = [g for g in groups if all(g[key] == value for key, value in where.items())]
    return match


def test_a_patient_with_many_lesions_counts_once() -> None:
    rows = _rows({"nano": [("p0", "lesion", 0.0), ("p0", "lesion", 0.2), ("p0", "lesion", 0.4), ("p1", "lesion", 1.0)]})
    group = _find(summarise(rows, ["nano"], 0, 200), structure="lesion")
    assert group["dsc"]["nano"] == pytest.approx((0.2 + 1.0) / 2)
    assert group["dsc_case"]["nano"] == pytest.approx((0.0 + 0.2 + 0.4 + 1.0) / 4)
    assert (group["cases"], group["patients"], group["objects"]) == (4, 2, 4)
    assert group["dsc_change"] is None and group["dsc_interval"]["nano"] is None
    assert group["absent_empty"]["nano"] is None  # NaN is no JSON


def test_pooled_averages_come_from_the_voxels_of_all_objects_together() -> None:
    rows = _rows({"nano": [("p0", "polyp", 0.0), ("p1", "polyp", 0.9)]})
    rows = rows.assign(voxels=[100, 1000], voxels_predicted=[100, 1200], voxels_both=[0, 990])
    group = _find(summarise(rows, ["nano"], 0, 200), structure="polyp")
    assert group["dsc"]["nano"] == pytest.approx(0.45)
    assert group["dsc_pooled"]["nano"] == pytest.approx(2 * 990 / 2400)
    assert group["iou_pooled"]["nano"] == pytest.approx(990 / 1410)


def test_the_change_is_the_difference_of_the_two_means_beside_it() -> None:
    generator = np.random.default_rng(0)
    before = [(f"p{i}", "lesion", float(generator.uniform(0.1, 0.4))) for i in range(12)]
    after = [(p, s, v + float(generator.uniform(0.2, 0.5))) for p, s, v in before]
    group = _find(summarise(_rows({"before": before, "after": after}), ["before", "after"], 0, 500), structure="lesion")
    change = group["dsc_change"]
    assert change["mean"] == pytest.approx(group["dsc"]["after"] - group["dsc"]["before"])
    assert (change["from"], change["to"]) == ("before", "after")
    assert 0.2 < change["low"] < change["mean"] < change["high"] < 0.5
    assert group["nsd_change"]["mean"] == pytest.approx(change["mean"] / 2)
    assert group["leaks"] == 1
    for label in ("before", "after"):
        low, high = group["dsc_interval"][label]
        assert low < group["dsc"][label] < high


def test_intervals_of_a_group_are_those_of_the_patients_own_means() -> None:
    generator = np.random.default_rng(3)
    entries = [(f"p{i // 3}", "lesion", float(generator.uniform())) for i in range(30)]
    group = _find(summarise(_rows({"nano": entries}), ["nano"], 7, 400), structure="lesion")
    means = np.array([np.mean([v for p, _, v in entries if p == f"p{i}"]) for i in range(10)])
    assert group["dsc_interval"]["nano"] == pytest.approx(_interval(means, 7, 400))


def test_totals_come_after_the_structures_and_cover_everything() -> None:
    rows = _rows({"nano": [("p0", "organ", 0.5), ("p0", "wall", 0.7), ("p1", "polyp", 0.9)]})
    groups = summarise(rows, ["nano"], 0, 200)
    assert [(g["modality"], g["structure"]) for g in groups] == [
        ("CT", "organ"), ("CT", "wall"), ("ENDOSCOPY", "polyp"), ("CT", "all"), ("ENDOSCOPY", "all"), ("all", "all"),
    ]  # fmt: skip
    assert groups[-1]["dsc"]["nano"] == pytest.approx((0.6 + 0.9) / 2)


def test_no_mean_is_made_of_millimetres_and_pixels() -> None:
    rows = _rows({"nano": [("p0", "organ", 0.5), ("p1", "polyp", 0.9)]}).assign(hd95=[4.0, 9.0])
    groups = summarise(rows.assign(kind=["volume", "clip"]), ["nano"], 0, 200)
    assert _find(groups, structure="organ")["hd95"]["nano"] == 4.0
    assert _find(groups, structure="polyp")["hd95"]["nano"] == 9.0
    assert groups[-1]["hd95"]["nano"] is None and groups[-1]["dsc"]["nano"] == pytest.approx(0.7)


def test_the_bias_of_volumes_and_their_error_are_two_numbers() -> None:
    rows = _rows({"nano": [("p0", "organ", 0.5), ("p1", "organ", 0.5)]}).assign(volume_error=[0.5, -0.3])
    group = _find(summarise(rows, ["nano"], 0, 200), structure="organ")
    assert group["volume_error"]["nano"] == pytest.approx(0.1)
    assert group["volume_error_abs"]["nano"] == pytest.approx(0.4)


def test_objects_predicted_together_tell_their_time_once() -> None:
    rows = _rows({"nano": [("p0", "a", 1.0)] * 4}, frames=10).assign(
        case=["x", "x", "x", "y"], object=[0, 1, 16, 0], seconds=[2.0, 2.0, 1.0, 7.0], peak_mb=[5.0, 5.0, 4.0, 6.0]
    )
    group = summarise(rows, ["nano"], 0, 200)[-1]
    assert group["seconds"]["nano"] == pytest.approx(5.0)  # case x: two batches of 2 and 1 s
    assert group["frames_per_second"]["nano"] == pytest.approx(2.0) and group["peak_mb"]["nano"] == 6.0


def test_sizes_are_terciles_within_a_structure_and_both_checkpoints_share_them() -> None:
    sizes = [10, 20, 30, 40, 50, 60, 70, 80, 90]
    entries = [(f"p{i}", "lesion", 0.1 * i) for i in range(9)]
    rows = _rows({"a": entries, "b": entries}).assign(voxels=[*sizes, *sizes])
    group = _find(summarise(rows, ["a", "b"], 0, 200), structure="lesion")
    assert [(s["size"], s["objects"], s["patients"]) for s in group["sizes"]] == [
        ("small", 3, 3), ("medium", 3, 3), ("large", 3, 3),
    ]  # fmt: skip
    assert [s["dsc"]["b"] for s in group["sizes"]] == pytest.approx([0.1, 0.4, 0.7])
    assert group["sizes"][0]["dsc_change"]["mean"] == 0.0


def test_few_objects_or_equal_ones_have_no_sizes() -> None:
    entries = [(f"p{i}", "lesion", 0.5) for i in range(12)]
    rows = _rows({"a": entries})
    assert set(size_classes(rows[:8].assign(voxels=range(8)))) == {""}
    assert set(size_classes(rows.assign(voxels=7))) == {""}
    assert set(size_classes(rows.assign(voxels=range(12)))) == {"small", "medium", "large"}


def test_every_group_has_every_score_and_is_json() -> None:
    groups = summarise(_rows({"a": [("p0", "organ", 0.5)], "b": [("p0", "organ", 0.6)]}), ["a", "b"], 0, 200)
    for group in json.loads(json.dumps(groups, allow_nan=False)):
        for name in SCORES:
            assert set(group[name]) == set(group[f"{name}_interval"]) == {"a", "b"}
            assert group[f"{name}_change"]["to"] == "b"
    assert groups[0]["cldice"]["a"] is None and groups[0]["cldice_change"]["mean"] is None


def test_thousands_of_rows_are_summarised_in_seconds() -> None:
    generator = np.random.default_rng(0)
    entries = [(f"p{i // 4}", f"s{i % 8}", float(generator.uniform())) for i in range(2000)]
    rows = _rows({"a": entries, "b": entries}).assign(hd95=generator.uniform(size=4000), voxels=range(4000))
    start = time.process_time()
    summarise(rows, ["a", "b"], 0, 2000)
    assert time.process_time() - start < 20  # 1.5 s on one core


# ------------------------------------------------------------------------------------------------------ intervals


@pytest.mark.parametrize("count", [3, 8, 40])
def test_intervals_are_those_of_scipy_from_the_same_draws(count: int) -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(count).beta(5, 1, (count, 3))
    values = (values * 64).round() / 64  # sums are exact then, so that equal means are equal to scipy as well
    values.sort(axis=0)  # as `mean_intervals` does before it draws
    expected = bootstrap(
        (values.T,), np.mean, axis=-1, n_resamples=999, method="BCa", rng=np.random.default_rng(4)
    ).confidence_interval
    intervals = np.array(mean_intervals(values, 4, 999))
    assert intervals[:, 0] == pytest.approx(expected.low) and intervals[:, 1] == pytest.approx(expected.high)


def test_a_patient_without_a_score_is_left_out_of_that_score_alone() -> None:
    values = np.random.default_rng(0).normal(size=(10, 2))
    values[4, 1] = math.nan
    one, other = mean_intervals(values, 1, 300)
    assert one == _interval(values[:, 0], 1, 300)
    assert other == _interval(np.delete(values[:, 1], 4), 1, 300)


def test_an_interval_does_not_depend_on_the_order_of_patients() -> None:
    values = np.random.default_rng(3).normal(size=(20, 2))
    assert mean_intervals(values[::-1], 1, 300) == mean_intervals(values, 1, 300)


def test_the_interval_covers_the_truth_about_as_often_as_it_claims() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for seed in range(60):
        interval = _interval(generator.normal(0.3, 0.1, 20), seed, 400)
        assert interval is not None
        hits += interval[0] <= 0.3 <= interval[1]
    assert 50 <= hits <= 60


def test_the_interval_is_the_same_for_the_same_seed() -> None:
    values = np.random.default_rng(2).normal(size=15)
    assert _interval(values, 5, 300) == _interval(values, 5, 300)
    assert _interval(values, 5, 300) != _interval(values, 6, 300)


def test_too_few_patients_have_no_interval_and_equal_ones_a_point() -> None:
    assert _interval(np.array([0.1, 0.4]), 0, 200) is None
    assert _interval(np.array([0.25] * 5), 0, 200) == (0.25, 0.25)
