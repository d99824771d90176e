"""The same command on published shards; patients who are left out; the same voxels under two names."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from medsam2.cases.case import CaseRef
from medsam2.errors import UserError
from medsam2.shards.index import read_index
from medsam2.shards.prepare.folder import source_content
from medsam2.shards.prepare.plan import make_plan
from medsam2.shards.prepare.run import PrepareOptions, PrepareResult, prepare
from medsam2.shards.prepare.stage import Job

OPTIONS = PrepareOptions(shares={"train": 0.5, "val": 0.5})
PARTS = (("imagesTr", "_0000.nii.gz"), ("labelsTr", ".nii.gz"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def splits(folder: Path) -> dict[str, str]:
    index = read_index(folder)
    return {row.case: row.split for row in map(index.row, range(len(index)))}


@pytest.fixture
def raw(tmp_path: Path, write) -> Path:
    """An nnU-Net data set of four cases."""
    write.nnunet(tmp_path / "raw" / "Dataset001")
    return tmp_path / "raw"


@pytest.fixture
def out(tmp_path: Path, raw: Path) -> Path:
    """The shards of `raw`."""
    prepare(raw, tmp_path / "shards", OPTIONS)
    return tmp_path / "shards"


def refused(raw: Path, out: Path, message: str) -> None:
    """Preparing again ends with an error, and the shards stay as they are."""
    before = content(out)
    with pytest.raises(UserError, match=message):
        prepare(raw, out, OPTIONS)
    assert content(out) == before


def test_unchanged_sources_are_complete_and_nothing_is_touched(raw: Path, out: Path):
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    result = prepare(raw, out, OPTIONS)
    assert (result.already_complete, result.num_cases) == (True, 0)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_state_of_a_case_is_the_one_that_earlier_versions_recorded():
    labels = (((1,), "liver"),)
    ref = CaseRef("data", "case", "patient", layout="nnunet_raw", modality="CT", labels=labels, spacing=(0.5, 1.0))
    assert source_content(Job(ref, "train", "c" * 16, "p" * 16)) == "a580e48a4718dc6b"


def test_what_a_kill_left_while_cleaning_up_goes_with_the_next_run(raw: Path, out: Path):
    (out / ".staging").mkdir(exist_ok=True)
    (out / ".staging" / "case.part").write_bytes(b"voxels of a patient")
    assert prepare(raw, out, OPTIONS).already_complete
    assert not list(out.glob(".staging/*.part*"))


def test_files_that_were_copied_or_touched_are_unchanged(raw: Path, out: Path):
    for path in raw.rglob("*.nii.gz"):
        os.utime(path, (1, 1))
    assert prepare(raw, out, OPTIONS).already_complete


def test_added_cases_are_refused_by_name_with_both_ways_to_go_on(raw: Path, out: Path, write):
    write.davis(raw / "echo")
    both = re.escape(f"data.shards=[{out},OTHER]")
    refused(raw, out, rf"2 added \(echo/\w+, echo/\w+\)\. .*prepare into another --out, or only .* {both}")


@pytest.mark.parametrize("part", ["imagesTr/smith_001_0000.nii.gz", "labelsTr/smith_001.nii.gz"])
def test_a_changed_image_or_mask_is_refused_by_the_name_of_its_case(raw: Path, out: Path, write, part: str):
    image, mask = write.scan(9)
    write.volume(raw / "Dataset001" / part, image if "images" in part else mask)
    refused(raw, out, r"1 changed \(Dataset001/smith_001\).*prepare into another --out\.$")


def test_structures_with_other_names_are_a_change(raw: Path, out: Path):
    path = raw / "Dataset001" / "dataset.json"
    path.write_text(path.read_text().replace("lesion", "cyst"))
    refused(raw, out, r"4 changed \(Dataset001/smith_000, ")


def test_cases_that_are_gone_are_told_by_their_salted_names(raw: Path, out: Path):
    for part, ending in PARTS:
        (raw / "Dataset001" / part / f"smith_001{ending}").unlink()
    refused(raw, out, r"1 removed \([0-9a-f]{16}\)")


def test_shards_without_states_are_complete_and_it_is_told(raw: Path, out: Path):
    (out / "sources.json").unlink()
    result = prepare(raw, out, OPTIONS)
    assert result.already_complete and "changes of them are not noticed" in dict(result.notes)["source"]


def test_a_failed_case_stays_failed_until_its_files_are_mended(tmp_path: Path, raw: Path):
    label = raw / "Dataset001" / "labelsTr" / "smith_002.nii.gz"
    whole = label.read_bytes()
    label.write_bytes(whole[:100])
    out = tmp_path / "shards"
    assert len(prepare(raw, out, OPTIONS).failures) == 1
    again = prepare(raw, out, OPTIONS)
    assert again.already_complete and again.summary["failed_cases"] == 1
    label.write_bytes(whole)
    refused(raw, out, r"1 changed \(Dataset001/smith_002\)")


def test_an_interrupted_publication_goes_on_to_the_same_bytes(
    tmp_path: Path, raw: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    again = tmp_path / "again"
    # after the shards, and after index.json but before index.arrow
    for number, point in enumerate(("medsam2.shards.prepare.run.publish", "pyarrow.ipc.new_file")):
        with monkeypatch.context() as patch:
            patch.setattr(point, fail)
            with pytest.raises(KeyboardInterrupt):
                prepare(raw, again, OPTIONS)
        assert not (again / "index.arrow").exists()
        (again / f"Dataset001-train-00009{number}.tar").write_bytes(b"of another state of the sources")
        (again / f".Dataset001-train-00000{number}.tar.7.partial").write_bytes(b"half")
    prepare(raw, again, OPTIONS)
    assert content(again) == content(out)


def leaving_out(tmp_path: Path, raw: Path, *names: str) -> PrepareResult:
    (tmp_path / "refused.txt").write_text("".join(f"{name}\n" for name in names))
    options = PrepareOptions(exclude_patients=tmp_path / "refused.txt")
    return prepare(raw, tmp_path / "some", options)


def test_patients_are_left_out_by_name(tmp_path: Path, raw: Path):
    result = leaving_out(tmp_path, raw, "smith_001", "", "smith_003")
    assert result.num_cases == 2
    assert ("excluded", "2 cases of --exclude-patients are left out.") in result.notes
    assert leaving_out(tmp_path, raw, "smith_001", "smith_003").already_complete
    with pytest.raises(UserError, match=r"1 added \(Dataset001/smith_003\)"):
        leaving_out(tmp_path, raw, "smith_001")


def test_a_list_of_patients_that_does_not_fit_is_refused(tmp_path: Path, raw: Path):
    with pytest.raises(UserError, match=r"no patient is named 'smith_01'.*Did you mean 'smith_001'"):
        leaving_out(tmp_path, raw, "smith_01")
    with pytest.raises(UserError, match="names all 4 patients"):
        leaving_out(tmp_path, raw, *(f"smith_{n:03d}" for n in range(4)))
    with pytest.raises(UserError, match="gone.txt: not readable"):
        prepare(raw, tmp_path / "some", PrepareOptions(exclude_patients=tmp_path / "gone.txt"))


def test_the_same_voxels_under_two_names_end_in_one_split_and_the_move_is_told(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "raw" / "Dataset001", cases=8)
    jobs = make_plan(folder, OPTIONS).jobs
    first = {split: next(job.ref.case_id for job in jobs if job.split == split) for split in ("train", "val")}
    earlier, copy = sorted(first.values())
    for part, ending in PARTS:
        shutil.copy(folder / part / f"{earlier}{ending}", folder / part / f"{copy}{ending}")
    result = prepare(tmp_path / "raw", tmp_path / "shards", OPTIONS)
    by_name = {job.ref.case_id: job for job in jobs}
    there = splits(tmp_path / "shards")
    assert there[by_name[copy].case] == there[by_name[earlier].case] == by_name[earlier].split
    assert result.summary["duplicates_across_splits"] == []
    notes = [note for about, note in result.notes if about == f"Dataset001/{copy}"]
    moved = f"moved from {by_name[copy].split} to {by_name[earlier].split}: "
    assert len(notes) == 1 and notes[0].startswith(moved) and notes[0].endswith(f" Dataset001/{earlier}.")
    prepare(tmp_path / "raw", tmp_path / "again", OPTIONS)
    assert content(tmp_path / "again") == content(tmp_path / "shards")
    assert prepare(tmp_path / "raw", tmp_path / "again", OPTIONS).already_complete


def test_states_of_sources_hold_salted_ids_alone(raw: Path, out: Path):
    states = json.loads((out / "sources.json").read_text())
    jobs = make_plan(raw, OPTIONS).jobs
    assert set(states) == {job.case for job in jobs}
    assert {state["patient"] for state in states.values()} == {job.patient for job in jobs}
    assert "smith" not in (out / "sources.json").read_text()
