"""Preparing again into published shards; the same voxels under two names."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from medsam2.cases.settings import DatasetSettings, SettingsBook
from medsam2.errors import UserError
from medsam2.shards.identity import read_salt, salted
from medsam2.shards.index import read_index, write_index
from medsam2.shards.load import load_segment
from medsam2.shards.plan import make_plan
from medsam2.shards.prepare import PrepareOptions, prepare
from medsam2.shards.remove import remove_patients

OPTIONS = PrepareOptions(shares={"train": 0.5, "val": 0.5})


def tars(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.tar"))}


def move(source: Path, target: Path, names: list[str]) -> None:
    """Cases of an nnU-Net data set from one copy of it to another."""
    for name in names:
        for part, ending in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
            (target / part).mkdir(parents=True, exist_ok=True)
            shutil.move(source / part / f"{name}{ending}", target / part / f"{name}{ending}")
    if not (target / "dataset.json").exists():
        shutil.copy(source / "dataset.json", target)


def splits(folder: Path) -> dict[str, str]:
    index = read_index(folder)
    return {row.case: row.split for row in map(index.row, range(len(index)))}


@pytest.fixture
def raw(tmp_path: Path, write) -> tuple[Path, Path]:
    """A data set of eight cases, five of which wait outside."""
    write.nnunet(tmp_path / "raw" / "Dataset001", cases=8)
    move(tmp_path / "raw" / "Dataset001", tmp_path / "later", [f"smith_{n:03d}" for n in range(3, 8)])
    return tmp_path / "raw", tmp_path / "later"


def test_more_cases_are_appended_and_what_was_published_stays_byte_for_byte(tmp_path: Path, raw):
    source, later = raw
    out = tmp_path / "shards"
    prepare(source, out, OPTIONS)
    before, assigned = tars(out), splits(out)
    move(later, source / "Dataset001", ["smith_003", "smith_004", "smith_005", "smith_006", "smith_007"])
    result = prepare(source, out, OPTIONS)
    assert (result.added, result.complete_before) == (5, False)
    after = tars(out)
    assert after == {**after, **before}
    assert set(after) == set(result.summary["shards"])
    assert {name: result.summary["shards"][name]["sha256"] for name in after} == after
    assert any(name.endswith("-000001.tar") for name in set(after) - set(before))
    assert splits(out) == {**splits(out), **assigned}
    assert len(splits(out)) == 8 == result.summary["counts"]["cases"]
    index = read_index(out)
    for number in range(len(index)):
        load_segment(index, number)
    assert prepare(source, out, OPTIONS).complete_before


def test_added_cases_of_a_published_patient_go_where_the_patient_is(tmp_path: Path, write):
    book = SettingsBook(common=DatasetSettings(patient="(?P<patient>smith)"))
    options = PrepareOptions(book=book, shares={"train": 0.5, "val": 0.5})
    write.nnunet(tmp_path / "raw" / "Dataset001", cases=2)
    out = tmp_path / "shards"
    prepare(tmp_path / "raw", out, options)
    where = set(splits(out).values())
    assert len(where) == 1
    # another data set with a case of the same patient
    write.nnunet(tmp_path / "raw" / "Dataset002", cases=3, channel="CT")
    prepare(tmp_path / "raw", out, options)
    assert set(splits(out).values()) == where


def test_an_interrupted_addition_leaves_the_old_index_valid_and_goes_on_to_the_same_bytes(
    tmp_path: Path, raw, monkeypatch: pytest.MonkeyPatch
):
    source, later = raw
    out, undisturbed = tmp_path / "shards", tmp_path / "undisturbed"
    for folder in (out, undisturbed):
        prepare(source, folder, OPTIONS)
    index = (out / "index.arrow").read_bytes()
    move(later, source / "Dataset001", ["smith_003", "smith_004", "smith_005"])
    prepare(source, undisturbed, OPTIONS)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    # after the shards, and after index.json but before index.arrow
    for number, point in enumerate(("medsam2.shards.prepare.publish", "pyarrow.ipc.new_file")):
        with monkeypatch.context() as patch:
            patch.setattr(point, fail)
            with pytest.raises(KeyboardInterrupt):
                prepare(source, out, OPTIONS)
        assert (out / "index.arrow").read_bytes() == index
        for row in range(len(read_index(out))):
            load_segment(read_index(out), row)
        (out / f"Dataset001-train-00009{number}.tar").write_bytes(b"left by a run that was killed")
    prepare(source, out, OPTIONS)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in undisturbed.iterdir()}


def test_cases_that_failed_are_tried_again_and_only_they(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001")
    label = folder / "labelsTr" / "smith_002.nii.gz"
    whole = label.read_bytes()
    label.write_bytes(whole[:100])
    out = tmp_path / "shards"
    assert len(prepare(folder, out, PrepareOptions()).failures) == 1
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    again = prepare(folder, out, PrepareOptions())
    assert (len(again.failures), again.added, again.complete_before) == (1, 0, False)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    label.write_bytes(whole)
    result = prepare(folder, out, PrepareOptions())
    assert (result.added, result.failures, result.summary["failed_cases"]) == (1, (), 0)
    assert not (out / "failures.jsonl").exists()
    assert prepare(folder, out, PrepareOptions()).complete_before


def test_a_failing_case_that_is_gone_is_no_failure_any_more(tmp_path: Path, write):
    write.nnunet(tmp_path / "raw" / "Dataset001")
    (tmp_path / "raw" / "Dataset001" / "labelsTr" / "smith_002.nii.gz").write_bytes(b"")
    (tmp_path / "raw" / "Dataset001" / "labelsTr" / "smith_003.nii.gz").write_bytes(b"")
    out = tmp_path / "shards"
    assert prepare(tmp_path / "raw", out, PrepareOptions()).summary["failed_cases"] == 2
    move(tmp_path / "raw" / "Dataset001", tmp_path / "away", ["smith_003"])
    assert prepare(tmp_path / "raw", out, PrepareOptions()).summary["failed_cases"] == 1
    assert json.loads((out / "index.json").read_text())["failed_cases"] == 1


@pytest.mark.parametrize("windows", [(), ("abdomen", "lung", (0, 80))])
def test_cases_that_vanished_from_the_source_stay_and_are_counted(tmp_path: Path, raw, windows):
    source, later = raw
    options = PrepareOptions(book=SettingsBook(common=DatasetSettings(windows=windows)))
    out = tmp_path / "shards"
    prepare(source, out, options)
    before = tars(out)
    move(source / "Dataset001", later, ["smith_001"])
    result = prepare(source, out, options)
    assert result.complete_before
    assert tars(out) == before
    assert ("source", f"{len(windows) or 1} prepared cases are not there any more; their shards stay.") in result.notes


def test_a_patient_who_was_taken_out_does_not_come_back(tmp_path: Path, raw):
    source, later = raw
    out = tmp_path / "shards"
    prepare(source, out, OPTIONS)
    remove_patients(out, ["smith_001"])
    move(later, source / "Dataset001", ["smith_003"])
    result = prepare(source, out, OPTIONS)
    assert result.added == 1
    gone = salted(read_salt(), "patient", "Dataset001", "smith_001")
    index = read_index(out)
    assert gone not in {index.row(n).patient for n in range(len(index))}
    assert result.summary["removed_patients"] == [gone]
    assert ("removed", "1 cases of patients who were taken out are left out.") in result.notes
    assert set(tars(out)) == set(result.summary["shards"])
    assert not set(result.summary["retired_shards"]) & set(tars(out))


def test_the_same_voxels_under_two_names_end_in_one_split_and_the_move_is_told(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "raw" / "Dataset001", cases=8)
    jobs = make_plan(folder, OPTIONS).jobs
    first = {split: next(job.ref.case_id for job in jobs if job.split == split) for split in ("train", "val")}
    earlier, copy = sorted(first.values())
    for part, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        shutil.copy(folder / part / f"{earlier}{end}", folder / part / f"{copy}{end}")
    result = prepare(tmp_path / "raw", tmp_path / "shards", OPTIONS)
    by_name = {job.ref.case_id: job for job in jobs}
    there = splits(tmp_path / "shards")
    assert there[by_name[copy].case] == there[by_name[earlier].case] == by_name[earlier].split
    assert result.summary["duplicates_across_splits"] == []
    moved = {
        "patient": by_name[copy].patient,
        "dataset": "Dataset001",
        "before": by_name[copy].split,
        "after": by_name[earlier].split,
        "like": by_name[earlier].case,
    }
    assert result.summary["moved_patients"] == [moved]
    notes = [note for about, note in result.notes if about == f"Dataset001/{copy}"]
    assert notes == [f"moved from {moved['before']} to {moved['after']}: it shares voxels with Dataset001/{earlier}."]
    again = tmp_path / "again"
    prepare(tmp_path / "raw", again, OPTIONS)
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "shards").iterdir()
    }


def test_a_new_case_with_the_voxels_of_a_published_one_joins_its_split(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "raw" / "Dataset001", cases=8)
    jobs = {job.ref.case_id: job for job in make_plan(folder, OPTIONS).jobs}
    published, later = sorted(jobs)[0], [name for name in sorted(jobs) if jobs[name].split != jobs["smith_000"].split]
    move(folder, tmp_path / "later", later[:1])
    for part, end in (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz")):
        shutil.copy(folder / part / f"{published}{end}", tmp_path / "later" / part / f"{later[0]}{end}")
    out = tmp_path / "shards"
    prepare(tmp_path / "raw", out, OPTIONS)
    before, old = tars(out), splits(out)
    move(tmp_path / "later", folder, later[:1])
    result = prepare(tmp_path / "raw", out, OPTIONS)
    assert tars(out) == {**tars(out), **before}
    assert splits(out) == {**old, jobs[later[0]].case: old[jobs[published].case]}
    assert len(result.summary["moved_patients"]) == 1


def test_published_patients_in_two_splits_are_refused_by_name(tmp_path: Path, write):
    write.nnunet(tmp_path / "raw" / "Dataset001", cases=8)
    out = tmp_path / "shards"
    prepare(tmp_path / "raw", out, OPTIONS)
    # the shards say of eight patients what is one in the eyes of whoever adds to them
    salt = read_salt()
    one = salted(salt, "patient", "Dataset001", "smith_000")
    rows = [{**row, "patient": one} for row in read_index(out).table.to_pylist()]
    write_index(out, rows, json.loads((out / "index.json").read_text()))
    with pytest.raises(UserError, match=r"patient 'smith_000': the shards have cases of theirs in (train|val) and in"):
        prepare(tmp_path / "raw", out, OPTIONS)
