from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsam2.errors import UserError
from medsam2.shards.split import assign, parse_shares, read_split_file


@dataclass(frozen=True)
class Named:
    dataset: str
    case_id: str
    patient_id: str


def cohort(patients: int, cases: int = 2, dataset: str = "d") -> list[Named]:
    return [Named(dataset, f"p{p}c{c}", f"p{p}") for p in range(patients) for c in range(cases)]


@given(patients=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_a_patient_is_in_one_split_and_no_split_is_empty(patients: int, seed: int):
    cases = cohort(patients)
    splits = assign(cases, {"train": 0.8, "val": 0.2}, seed)
    assert len(splits) == len(cases)
    for case in cases:
        assert splits[case.dataset, case.case_id] == splits[case.dataset, f"{case.patient_id}c0"]
    if patients >= 2:
        assert set(splits.values()) == {"train", "val"}


def test_shares_hold_for_many_patients_and_the_seed_matters():
    cases = cohort(2000, 1)
    splits = assign(cases, {"train": 0.7, "val": 0.1, "test": 0.2}, 0)
    shares = [list(splits.values()).count(name) / 2000 for name in ("train", "val", "test")]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.04)
    assert splits != assign(cases, {"train": 0.7, "val": 0.1, "test": 0.2}, 1)


def test_added_cases_do_not_move_others():
    shares = {"train": 0.8, "val": 0.2}
    before, after = assign(cohort(100), shares, 3), assign(cohort(150), shares, 3)
    assert all(after[key] == split for key, split in before.items())


def test_a_patient_of_two_data_sets_stays_in_one_split():
    cases = cohort(3, dataset="a") + cohort(3, dataset="b")
    for seed in range(20):
        splits = assign(cases, {"train": 0.8, "val": 0.2}, seed)
        for patient in range(3):
            assert splits["a", f"p{patient}c0"] == splits["b", f"p{patient}c1"]


def test_a_share_of_zero_gets_nobody():
    assert set(assign(cohort(5), {"train": 0.0, "val": 1.0}, 0).values()) == {"val"}


def test_shares_are_read_or_refused():
    assert parse_shares("0.7,0.1,0.2") == {"train": 0.7, "val": 0.1, "test": 0.2}
    assert parse_shares("1") == {"train": 1.0}
    for text in ("0.8,0.3", "a,b", "1.2,-0.2", "", "0.25,0.25,0.25,0.25"):
        with pytest.raises(UserError, match="add up to 1"):
            parse_shares(text)


def test_a_split_file_names_patients_or_cases(tmp_path: Path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": ["p0", "p1"], "val": ["p2c0"]}))
    splits = read_split_file(path, cohort(4))
    assert splits == {("d", "p0c0"): "train", ("d", "p0c1"): "train", ("d", "p1c0"): "train", ("d", "p1c1"): "train",
                      ("d", "p2c0"): "val"}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"train": ["p00"]}', "no case or patient is named 'p00'.*Did you mean"),
        ('{"train": ["p0"], "val": ["p0"]}', "'p0' stands in train and in val"),
        ('{"train": ["p0c0"], "val": ["p0c1"]}', "patient 'p0' would be in"),
        ('{"train": "p0"}', "expected"),
        ("[1]", "expected"),
        ("{", "not readable as json"),
        ('{"a/b": ["p0"]}', "plain word"),
    ],
)
def test_a_split_file_that_does_not_fit_is_refused(tmp_path: Path, content: str, match: str):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(UserError, match=match):
        read_split_file(path, cohort(4))


def test_a_missing_split_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        read_split_file(tmp_path / "gone.json", cohort(1))
