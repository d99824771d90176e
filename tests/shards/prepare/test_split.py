from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsam2.errors import UserError
from medsam2.shards.prepare.split import (
    HashedCase,
    assign_splits,
    describe_empty_splits,
    join_duplicates,
    parse_shares,
    read_split_file,
)


@dataclass(frozen=True)
class Named:
    dataset: str
    case_id: str
    patient_id: str
    split: str = ""


def cohort(patients: int, cases: int = 2, dataset: str = "d") -> list[Named]:
    return [Named(dataset, f"p{p}c{c}", f"p{p}") for p in range(patients) for c in range(cases)]


@given(patients=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_a_patient_is_in_one_split_and_no_split_is_empty(patients: int, seed: int):
    cases = cohort(patients)
    splits = assign_splits(cases, {"train": 0.8, "val": 0.2}, seed)
    assert len(splits) == len(cases)
    for case in cases:
        assert splits[case.dataset, case.case_id] == splits[case.dataset, f"{case.patient_id}c0"]
    if patients >= 2:
        assert set(splits.values()) == {"train", "val"}


def test_shares_hold_for_many_patients_and_the_seed_matters():
    cases = cohort(2000, 1)
    splits = assign_splits(cases, {"train": 0.7, "val": 0.1, "test": 0.2}, 0)
    shares = [list(splits.values()).count(name) / 2000 for name in ("train", "val", "test")]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.04)
    assert splits != assign_splits(cases, {"train": 0.7, "val": 0.1, "test": 0.2}, 1)


def test_added_cases_do_not_move_others():
    shares = {"train": 0.8, "val": 0.2}
    before, after = assign_splits(cohort(100), shares, 3), assign_splits(cohort(150), shares, 3)
    assert all(after[key] == split for key, split in before.items())


def test_a_patient_of_two_data_sets_stays_in_one_split():
    cases = cohort(3, dataset="a") + cohort(3, dataset="b")
    for seed in range(20):
        splits = assign_splits(cases, {"train": 0.8, "val": 0.2}, seed)
        for patient in range(3):
            assert splits["a", f"p{patient}c0"] == splits["b", f"p{patient}c1"]


def test_what_a_data_set_prescribes_is_honoured_for_all_cases_of_the_patient():
    cases = [replace(case, split="test") if case.case_id == "p1c1" else case for case in cohort(4)]
    for seed in range(20):
        splits = assign_splits(cases, {"train": 0.8, "val": 0.2}, seed)
        assert splits["d", "p1c0"] == splits["d", "p1c1"] == "test"
        assert {"train", "val"} <= set(splits.values())


@pytest.mark.parametrize(
    ("splits", "match"),
    [
        (("train", "val"), "'p0' is prescribed to train by d/p0c0 and to val by d/p0c1"),
        (("a/b", ""), "d/p0c0: split 'a/b' must be a plain word"),
    ],
)
def test_prescribed_splits_that_contradict_are_refused(splits, match: str):
    cases = [replace(case, split=split) for case, split in zip(cohort(1), splits, strict=True)]
    with pytest.raises(UserError, match=match):
        assign_splits(cases, {"train": 0.8, "val": 0.2}, 0)


def test_a_data_set_too_small_for_its_splits_is_warned_about():
    cases = [*cohort(1, dataset="tiny"), *cohort(30, dataset="large")]
    shares = {"train": 0.5, "val": 0.3, "test": 0.2}
    cases = [replace(case, patient_id=f"{case.dataset} {case.patient_id}") for case in cases]
    (warning,) = describe_empty_splits(cases, assign_splits(cases, shares, 0), shares)
    assert warning.startswith("tiny: no patient in ") and "(1 patient: " in warning and "--split-file" in warning
    assert (
        describe_empty_splits(cases, assign_splits(cases, {"train": 1.0, "val": 0.0}, 0), {"train": 1.0, "val": 0.0})
        == []
    )


def test_a_share_of_zero_gets_nobody():
    assert set(assign_splits(cohort(5), {"train": 0.0, "val": 1.0}, 0).values()) == {"val"}


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
        ('{"train": ["p0"], "val": ["p0"]}', "'p0' is in train and in val"),
        ('{"train": ["p0c0"], "val": ["p0c1"]}', "patient 'p0' is prescribed to train by d/p0c0 and to val by d/p0c1"),
        ('{"train": "p0"}', "expected"),
        ("[1]", "expected"),
        ("{", "expected json"),
        ('{"a/b": ["p0"]}', "plain word"),
    ],
)
def test_a_split_file_that_does_not_fit_is_refused(tmp_path: Path, content: str, match: str):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(UserError, match=match):
        read_split_file(path, cohort(4))


def test_a_missing_split_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="No such file"):
        read_split_file(tmp_path / "gone.json", cohort(1))


def hashed(case: str, patient: str, content: str, split: str, dataset: str = "d") -> HashedCase:
    return HashedCase(dataset, case, patient, content, split)


CASES = st.lists(
    st.builds(
        hashed,
        case=st.integers(0, 30).map("c{:02d}".format),
        patient=st.integers(0, 8).map("p{}".format),
        content=st.integers(0, 10).map(lambda n: f"h{n}" if n else ""),
        split=st.just(""),
        dataset=st.sampled_from("de"),
    ),
    max_size=25,
    unique_by=lambda c: (c.dataset, c.case_id),
)


def with_splits(cases: list[HashedCase], numbers: list[int]) -> list[HashedCase]:
    """One split a patient."""
    names = ("train", "val", "test")
    return [replace(case, split=names[numbers[int(case.patient_id[1:])]]) for case in cases]


COHORTS = st.builds(with_splits, CASES, st.lists(st.integers(0, 2), min_size=9, max_size=9))


def after(cases: list[HashedCase]) -> list[HashedCase]:
    joined = join_duplicates(cases)
    return [replace(case, split=joined.get(case, case).split) for case in cases]


@given(cases=COHORTS, order=st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_no_patient_and_no_voxels_end_in_two_splits_and_the_order_of_cases_does_not_matter(cases, order):
    by_patient, by_content = defaultdict(set), defaultdict(set)
    for case in after(cases):
        by_patient[case.patient_id].add(case.split)
        by_content[case.content_hash or case].add(case.split)
    assert all(len(splits) == 1 for splits in (*by_patient.values(), *by_content.values()))
    assert join_duplicates(after(cases)) == {}
    shuffled = list(cases)
    order.shuffle(shuffled)
    assert join_duplicates(shuffled) == join_duplicates(cases)


def test_the_first_case_decides_for_all_that_are_linked_to_it():
    cases = [
        hashed("first", "a", "h", "train"), hashed("second", "b", "h", "val"), hashed("other", "b", "g", "val", "e"),
        hashed("third", "c", "g", "test", "e"), hashed("apart", "q", "", "val"), hashed("too", "r", "", "test"),
    ]  # fmt: skip
    first, second, other, third = cases[:4]
    assert join_duplicates(cases) == {second: first, other: first, third: first}
    assert join_duplicates([]) == {}
