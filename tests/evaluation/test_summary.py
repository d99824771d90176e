"""Means and changes over patients, and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from medsam2.evaluation.summary import bootstrap_interval, summarise


def _rows(scores: dict[str, list[tuple[str, str, float]]]) -> pd.DataFrame:
    """Rows of (patient, structure, dsc) by checkpoint."""
    return pd.DataFrame(
        [
            {
                "checkpoint": label, "dataset": "d", "modality": "CT" if structure != "polyp" else "ENDOSCOPY",
                "structure": structure, "case": f"{patient}-{place}", "patient": patient, "dsc": dsc, "nsd": dsc / 2,
                "absent_empty_share": math.nan, "leak": label == "after" and patient == "p0",
            }
            for label, entries in scores.items()
            for place, (patient, structure, dsc) in enumerate(entries)
        ]
    )  # fmt: skip


def _find(groups: list[dict], **where: str) -> dict:
    (found,) = [g for g in groups if all(g[key] == value for key, value in where.items())]
    return found


def test_a_patient_with_many_lesions_counts_once() -> None:
    rows = _rows({"nano": [("p0", "lesion", 0.0), ("p0", "lesion", 0.2), ("p0", "lesion", 0.4), ("p1", "lesion", 1.0)]})
    group = _find(summarise(rows, ["nano"], 0, 200), structure="lesion")
    assert group["dsc"]["nano"] == pytest.approx((0.2 + 1.0) / 2)
    assert (group["cases"], group["patients"], group["objects"]) == (4, 2, 4)
    assert group["dsc_change"] is None
    assert group["absent_empty"]["nano"] is None  # NaN is no JSON


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


def test_totals_come_after_the_structures_and_cover_everything() -> None:
    rows = _rows({"nano": [("p0", "organ", 0.5), ("p0", "wall", 0.7), ("p1", "polyp", 0.9)]})
    groups = summarise(rows, ["nano"], 0, 200)
    assert [(g["modality"], g["structure"]) for g in groups] == [
        ("CT", "organ"), ("CT", "wall"), ("ENDOSCOPY", "polyp"), ("CT", "all"), ("ENDOSCOPY", "all"), ("all", "all"),
    ]  # fmt: skip
    assert groups[-1]["dsc"]["nano"] == pytest.approx((0.6 + 0.9) / 2)


def test_the_interval_covers_the_truth_about_as_often_as_it_claims() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for seed in range(60):
        found = bootstrap_interval(generator.normal(0.3, 0.1, 20), seed, 400)
        assert found is not None
        hits += found[0] <= 0.3 <= found[1]
    assert 50 <= hits <= 60


def test_the_interval_is_the_same_for_the_same_seed() -> None:
    values = np.random.default_rng(2).normal(size=15)
    assert bootstrap_interval(values, 5, 300) == bootstrap_interval(values, 5, 300)
    assert bootstrap_interval(values, 5, 300) != bootstrap_interval(values, 6, 300)


def test_too_few_patients_have_no_interval_and_equal_ones_a_point() -> None:
    assert bootstrap_interval(np.array([0.1, 0.4]), 0, 200) is None
    assert bootstrap_interval(np.array([0.25] * 5), 0, 200) == (0.25, 0.25)
