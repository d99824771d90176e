from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsam2.errors import UserError
from medsam2.shards.split import Hashed, Joined, Move, assign, join_duplicates, parse_shares, read_split_file, thin


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


@given(
    before=st.integers(1, 12), after=st.integers(0, 12), seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)),
    shares=st.sampled_from([(0.8, 0.2), (0.5, 0.3, 0.2), (0.1, 0.9)]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_whatever_is_settled_stays_when_cases_are_added(before, after, seeds, shares):
    wanted, other = (dict(zip(("train", "val", "test"), s, strict=False)) for s in (shares, (0.5, 0.5)))
    early = cohort(before)
    settled = {case.patient_id: "" for case in early}
    first = assign(early, wanted, seeds[0])
    for case in early:
        settled[case.patient_id] = first[case.dataset, case.case_id]
    grown = [*cohort(before + after, 3), *cohort(2, dataset="e")]
    later = assign(grown, other, seeds[1], settled)
    assert {key: later[key] for key in first} == first
    for case in grown:
        assert later[case.dataset, case.case_id] == settled.get(case.patient_id, later[case.dataset, case.case_id])


def test_a_settled_patient_is_not_moved_to_fill_an_empty_split():
    cases = cohort(3)
    for seed in range(20):
        splits = assign(cases, {"train": 0.5, "val": 0.5}, seed, {"p0": "train", "p1": "train"})
        assert splits["d", "p0c0"] == splits["d", "p1c0"] == "train" and splits["d", "p2c0"] == "val"


def test_what_a_data_set_prescribes_is_honoured_for_all_cases_of_the_patient():
    cases = [replace(case, split="test") if case.case_id == "p1c1" else case for case in cohort(4)]
    for seed in range(20):
        splits = assign(cases, {"train": 0.8, "val": 0.2}, seed)
        assert splits["d", "p1c0"] == splits["d", "p1c1"] == "test"
        assert {"train", "val"} <= set(splits.values())


@pytest.mark.parametrize(
    ("splits", "fixed", "match"),
    [
        (("train", "val"), {}, "'p0' is prescribed to train by d/p0c0 and to val by d/p0c1"),
        (("val", ""), {"p0": "train"}, "'p0' is prescribed to val by d/p0c0, but .* in train; write train"),
        (("a/b", ""), {}, "d/p0c0: split 'a/b' must be a plain word"),
    ],
)
def test_prescribed_splits_that_contradict_are_refused(splits, fixed, match: str):
    cases = [replace(case, split=split) for case, split in zip(cohort(1), splits, strict=True)]
    with pytest.raises(UserError, match=match):
        assign(cases, {"train": 0.8, "val": 0.2}, 0, fixed)


def test_a_data_set_too_small_for_its_splits_is_warned_about():
    cases = [*cohort(1, dataset="tiny"), *cohort(30, dataset="large")]
    shares = {"train": 0.5, "val": 0.3, "test": 0.2}
    cases = [replace(case, patient_id=f"{case.dataset} {case.patient_id}") for case in cases]
    (warning,) = thin(cases, assign(cases, shares, 0), shares)
    assert warning.startswith("tiny: no patient in ") and "(1 patient: " in warning and "--split-file" in warning
    assert thin(cases, assign(cases, {"train": 1.0, "val": 0.0}, 0), {"train": 1.0, "val": 0.0}) == []


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


def hashed(case: str, patient: str, content: str, split: str, settled: bool = False, dataset: str = "d") -> Hashed:
    return Hashed(dataset, case, patient, content, split, settled)


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


def given_splits(cases: list[Hashed], numbers: list[int], settled: int) -> list[Hashed]:
    """One split a patient; patients below `settled` are published."""
    names = ("train", "val", "test")
    return [
        replace(c, split=names[numbers[int(c.patient_id[1:])]], settled=int(c.patient_id[1:]) < settled) for c in cases
    ]


COHORTS = st.builds(given_splits, CASES, st.lists(st.integers(0, 2), min_size=9, max_size=9), st.integers(0, 9))


@given(cases=COHORTS, order=st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_no_patient_and_no_voxels_end_in_two_splits_and_the_order_of_cases_does_not_matter(cases, order):
    joined = join_duplicates(cases)
    by_patient, by_content = defaultdict(set), defaultdict(set)
    for case in cases:
        by_patient[case.patient_id].add(joined.splits[case.dataset, case.case_id])
        by_content[case.content_hash].add(joined.splits[case.dataset, case.case_id])
        if case.settled:
            assert joined.splits[case.dataset, case.case_id] == case.split
    assert all(len(splits) == 1 for splits in by_patient.values())
    for content, splits in by_content.items():
        if content and len(splits) > 1:
            owners = {c.patient_id for c in cases if c.content_hash == content and c.settled}
            assert any(owners <= set(conflict) for conflict in joined.conflicts)
    shuffled = list(cases)
    order.shuffle(shuffled)
    assert join_duplicates(shuffled) == joined


@given(cases=COHORTS)
@settings(max_examples=100, deadline=None)
def test_joining_again_moves_nobody_and_every_move_is_reported(cases):
    joined = join_duplicates(cases)
    after = [replace(c, split=joined.splits[c.dataset, c.case_id]) for c in cases]
    again = join_duplicates(after)
    assert (again.splits, again.moves, again.conflicts) == (joined.splits, [], joined.conflicts)
    reported = {(m.dataset, name) for m in joined.moves for name in m.case_ids}
    assert reported == {(c.dataset, c.case_id) for c, d in zip(cases, after, strict=True) if c.split != d.split}
    contents = {(c.dataset, c.case_id): (c.patient_id, c.content_hash) for c in cases}
    for move in joined.moves:
        patient, content = contents[move.like]
        assert patient != move.patient_id
        assert any(c.patient_id == move.patient_id and c.content_hash == content for c in cases)


@given(cases=COHORTS, added=COHORTS)
@settings(max_examples=100, deadline=None)
def test_added_duplicates_never_move_what_is_published(cases, added):
    joined = join_duplicates(cases)
    settled = [replace(c, split=joined.splits[c.dataset, c.case_id], settled=True) for c in cases]
    known = {c.patient_id: c.split for c in settled}
    new = [replace(c, case_id=f"new {c.case_id}", split=known.get(c.patient_id, c.split), settled=False) for c in added]
    later = join_duplicates(settled + new)
    assert {key: later.splits[key] for key in joined.splits} == joined.splits


def test_the_earlier_assignment_wins_and_the_move_says_whom_it_follows():
    cases = [
        hashed("new", "b", "h", "val"), hashed("other", "b", "g", "val", dataset="e"),
        hashed("third", "c", "g", "test"),
        hashed("old", "z", "h", "train", settled=True), hashed("apart", "q", "", "val"), hashed("too", "r", "", "test"),
    ]  # fmt: skip
    joined = join_duplicates(cases)
    assert joined.moves == [
        Move("b", "d", ("new",), "val", "train", ("d", "old")),
        Move("b", "e", ("other",), "val", "train", ("d", "old")),
        Move("c", "d", ("third",), "test", "train", ("e", "other")),
    ]
    assert (joined.splits["d", "apart"], joined.splits["d", "too"]) == ("val", "test")
    assert joined.conflicts == []


def test_two_settled_patients_in_two_splits_stay_and_are_told():
    cases = [
        hashed("a", "p", "h", "train", settled=True), hashed("b", "q", "g", "val", settled=True),
        hashed("link1", "r", "h", "val"), hashed("link2", "r", "g", "val"),
    ]  # fmt: skip
    joined = join_duplicates(cases)
    assert joined.splits == {("d", "a"): "train", ("d", "b"): "val", ("d", "link1"): "train", ("d", "link2"): "train"}
    assert joined.conflicts == [("p", "q")]
    assert [(move.before, move.after) for move in joined.moves] == [("val", "train")]


def test_nothing_to_join_is_no_error():
    assert join_duplicates([]) == Joined({}, [], [])
