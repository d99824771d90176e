"""Paired tests against scipy, against answers known by hand, and under a simulated null."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from medsam2.evaluation.statistics.comparison import (
    MAX_EXACT_PATIENTS,
    MIN_PATIENTS,
    RANDOM_FLIPS,
    compare,
    format_p,
    holm,
    sign_flip,
)


def _rows(scores: dict[str, np.ndarray], **columns: Any) -> pd.DataFrame:
    """One object per patient: DSC by checkpoint."""
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "checkpoint": label, "protocol": "box", "dataset": "d", "modality": "CT", "structure": "lesion",
                    "kind": "volume", "case": [f"c{i}" for i in range(len(values))], "object": 0,
                    "patient": [f"p{i}" for i in range(len(values))], "voxels": range(1, len(values) + 1),
                    "dsc": values, "leak": False, **columns,
                }
            )
            for label, values in scores.items()
        ],
        ignore_index=True,
    )  # fmt: skip


def _of(tests: list[dict], **where: str) -> dict:
    (match,) = [test for test in tests if all(test[key] == value for key, value in where.items())]
    return match


@pytest.mark.parametrize("count", [6, 9, MAX_EXACT_PATIENTS - 1])
def test_the_exact_p_is_that_of_scipy(count: int) -> None:
    from scipy.stats import permutation_test

    values = np.random.default_rng(count).normal(0.3, 1, count)
    values[1] = 0.0  # an equal score
    expected = permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False
    ).pvalue
    assert sign_flip(values, 0) == pytest.approx(expected, abs=1e-12)


def test_drawn_flips_come_close_to_all_flips() -> None:
    from scipy.stats import permutation_test

    values = np.random.default_rng(0).normal(0.8, 1, 16)
    expected = permutation_test(
        (values,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=2**16, vectorized=True
    ).pvalue
    assert 0.01 < expected < 0.2
    assert sign_flip(values, 1) == pytest.approx(expected, abs=4 * (expected / RANDOM_FLIPS) ** 0.5)


def test_six_patients_who_all_gain_have_the_smallest_p_there_is() -> None:
    assert sign_flip(np.array([0.1, 0.2, 0.05, 0.3, 0.1, 0.2]), 0) == 2 / 2**6
    assert sign_flip(np.zeros(8), 0) == 1.0
    assert sign_flip(np.full(40, 0.1), 0) == 1 / (1 + RANDOM_FLIPS)


@pytest.mark.parametrize("count", [8, 30])
def test_equal_checkpoints_are_called_different_about_as_often_as_alpha_says(count: int) -> None:
    generator = np.random.default_rng(count)
    values = generator.exponential(size=(300, count)) * generator.choice([-1, 1], (300, count))  # skewed, centred at 0
    share = np.mean([sign_flip(row, seed) <= 0.05 for seed, row in enumerate(values)])
    assert 0.015 <= share <= 0.09  # 99 % of binomial(300, 0.05)


def test_holm_gives_the_values_worked_out_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_share_of_families_with_a_false_find_below_alpha() -> None:
    values = np.random.default_rng(0).uniform(size=(2000, 10))
    assert np.mean([min(holm(list(family))) < 0.05 for family in values]) < 0.065
    assert np.mean(values.min(1) < 0.05) > 0.35  # without it


def test_a_clear_gain_is_found_with_its_effect_and_interval() -> None:
    generator = np.random.default_rng(0)
    before = generator.uniform(0.3, 0.6, 20)
    gain = generator.normal(0.2, 0.05, 20)
    test = _of(compare(_rows({"before": before, "after": before + gain}), ["before", "after"], 0), by="all")
    assert test["mean"] == pytest.approx(gain.mean())
    assert test["effect"] == pytest.approx(gain.mean() / gain.std(ddof=1))
    assert test["low"] < gain.mean() < test["high"] and test["better"] == 1.0
    assert (test["verdict"], test["test"], test["patients"]) == ("better", "drawn", 20)
    back = _of(compare(_rows({"before": before, "after": before + gain}), ["after", "before"], 0), by="all")
    assert (back["verdict"], back["better"]) == ("worse", 0.0) and back["p"] == pytest.approx(test["p"])


def test_a_test_does_not_depend_on_the_salted_names_of_patients() -> None:
    before, after = np.random.default_rng(5).uniform(size=(2, MAX_EXACT_PATIENTS + 6))
    rows = _rows({"a": before, "b": after})
    other_salt = rows.assign(patient=[f"p{99 - number}" for number in rows["voxels"]])
    assert compare(other_salt, ["a", "b"], 0) == compare(rows, ["a", "b"], 0)


def test_below_six_patients_it_says_that_no_test_is_possible() -> None:
    few = {"a": np.full(MIN_PATIENTS - 1, 0.2), "b": np.full(MIN_PATIENTS - 1, 0.9)}
    test = compare(_rows(few), ["a", "b"], 0)[0]
    assert test["p"] is None and test["p_holm"] is None and test["test"] == "none"
    assert test["verdict"] == "no test: fewer than 6 patients" and test["mean"] == pytest.approx(0.7)
    enough = compare(_rows({"a": np.full(6, 0.2), "b": np.full(6, 0.9)}), ["a", "b"], 0)[0]
    assert enough["verdict"] == "better"


def test_lesions_of_one_patient_are_not_independent() -> None:
    generator = np.random.default_rng(1)
    before = generator.uniform(0.2, 0.4, 40)
    rows = _rows({"a": before, "b": before + 0.3})
    rows["patient"] = [f"p{i % 4}" for i in range(40)] * 2
    test = _of(compare(rows, ["a", "b"], 0), by="all")
    assert (test["objects"], test["patients"], test["p"]) == (40, 4, None)


def test_a_smaller_distance_is_the_better_one() -> None:
    far = np.random.default_rng(0).uniform(5, 9, 10)
    rows = _rows({"a": far, "b": far - 2}).rename(columns={"dsc": "hd95"})
    test = _of(compare(rows, ["a", "b"], 0), by="all", score="hd95")
    assert (test["mean"], test["better"], test["verdict"]) == (pytest.approx(-2), 1.0, "better")


def test_every_pair_every_structure_and_every_size_is_tested_and_corrected_together() -> None:
    generator = np.random.default_rng(2)
    scores = {label: generator.uniform(size=24) for label in "abc"}
    rows = _rows(scores)
    rows["structure"] = ["liver", "spleen"] * 36
    tests = compare(rows, list("abc"), 0)
    count = {by: sum(test["by"] == by for test in tests) for by in ("all", "modality", "structure", "size")}
    assert count == {"all": 3, "modality": 3, "structure": 6, "size": 9}
    family = [test for test in tests if test["by"] == "structure"]
    assert [t["p_holm"] for t in family] == pytest.approx(holm([t["p"] for t in family]))
    assert {(t["from"], t["to"]) for t in family} == {("a", "b"), ("a", "c"), ("b", "c")}
    json.dumps(tests, allow_nan=False)


def test_only_objects_that_both_were_scored_on_count() -> None:
    rows = _rows({"a": np.linspace(0, 0.5, 10), "b": np.linspace(0.2, 0.7, 10)})
    rows = rows[~((rows["checkpoint"] == "b") & (rows["case"] == "c9"))]
    test = _of(compare(rows, ["a", "b"], 0), by="all")
    assert test["objects"] == 9 and test["mean"] == pytest.approx(0.2)


def test_one_checkpoint_and_scores_that_were_not_computed_give_no_test() -> None:
    rows = _rows({"a": np.ones(8), "b": np.ones(8)}, nsd=np.nan)
    assert compare(rows[rows["checkpoint"] == "a"], ["a"], 0) == []
    assert {test["score"] for test in compare(rows, ["a", "b"], 0)} == {"dsc"}


def test_no_test_is_made_of_millimetres_and_pixels() -> None:
    rows = _rows({"a": np.linspace(1, 2, 12), "b": np.linspace(2, 3, 12)}).rename(columns={"dsc": "hd95"})
    rows["kind"] = ["volume", "clip"] * 12
    rows["modality"] = ["CT", "US"] * 12
    assert {test["by"] for test in compare(rows, ["a", "b"], 0)} == {"modality", "structure"}


def test_p_values_are_printed_as_journals_ask() -> None:
    assert [format_p(p) for p in (None, 0.0004, 0.0123, 1.0)] == ["-", "<0.001", "0.012", "1.000"]
