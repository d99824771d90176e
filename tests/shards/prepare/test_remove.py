"""A patient out of the shards: the others stay as they were, nothing of the patient stays, and no kill hurts."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_shards import SCANS, build, case_id, patient_id, segment

from medsam2.errors import UserError
from medsam2.shards.index import INDEX_FILE, SUMMARY_FILE, read_index, write_index
from medsam2.shards.load import load_segment
from medsam2.shards.prepare.remove import RemovalResult, remove_patients
from medsam2.shards.summary import summarise


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build(tmp_path / "shards")


def contents(folder: Path) -> dict[str, tuple[bytes, bytes]]:
    """Every segment by key: its image and its planes."""
    index = read_index(folder)
    loaded = (load_segment(index, number) for number in range(len(index)))
    return {row.key: (image.tobytes(), planes.tobytes()) for row, image, planes in loaded}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / SUMMARY_FILE).read_text())
    return content


def whole(folder: Path) -> bool:
    """Both indices name the same shards, and these are what they are said to be."""
    content = summary(folder)["shards"]
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in content}
    return set(content) == set(read_index(folder).table.column("shard").to_pylist()) and all(
        content[name] == {"bytes": (folder / name).stat().st_size, "sha256": sums[name]} for name in content
    )


def without(before: dict[str, Any], *patients: str) -> dict[str, Any]:
    gone = {f"{s.dataset}-{case_id(s)}" for s in SCANS if s.patient in patients}
    return {key: value for key, value in before.items() if key.rsplit("-", 1)[0] not in gone}


def test_the_others_are_as_before_and_nothing_of_the_patient_stays(folder: Path):
    before, old = contents(folder), files(folder)
    assert remove_patients(folder, ["smith"]) == RemovalResult(cases=3, segments=6, shards=3)
    assert contents(folder) == without(before, "smith") != before
    now = files(folder)
    assert set(now) == {
        SUMMARY_FILE, INDEX_FILE, "d-train-000002.tar", "d-train-000003.tar", "d-train-000004.tar", "d-val-000000.tar",
        "e-train-000001.tar",
    }  # fmt: skip
    untouched = [name for name in now if name in old and name.endswith(".tar")]
    assert len(untouched) == 3 and all(now[name] == old[name] for name in untouched)
    for scan in (s for s in SCANS if s.patient == "smith"):
        for record, frames, _ in (segment(scan, first) for first in (0, 3)):
            secrets = (frames[0].tobytes(), *(t.encode() for t in (record.case, record.content_hash, record.patient)))
            assert not any(secret in content for secret in secrets for content in now.values())


def test_the_index_says_what_is_there(folder: Path):
    old = summary(folder)
    assert len(old["duplicates_across_splits"]) == 1
    remove_patients(folder, ["smith", "meier"])
    content = summary(folder)
    assert content["counts"]["cases"] == len(content["cases"]) == 4 and content["duplicates"] == []
    assert content["datasets"] == old["datasets"] and content["configuration"] == {"seed": 0}
    assert set(content) == set(old) and whole(folder)


def test_a_new_shard_is_a_tar_that_webdataset_reads(folder: Path):
    import webdataset

    remove_patients(folder, ["smith"])
    read = webdataset.WebDataset(str(folder / "d-train-000003.tar"), shardshuffle=False, empty_check=False)
    samples = list(read)
    jones = case_id(SCANS[1])
    assert [sample["__key__"] for sample in samples] == [f"d-{jones}-00000", f"d-{jones}-00003"]
    assert json.loads(samples[0]["json"])["case"] == jones and len(samples[0]) == 2 + 1 + 6 + 1
    with tarfile.open(folder / "d-train-000003.tar") as archive:
        assert len(archive.getnames()) == 14


@pytest.mark.parametrize("name", ["novak", None])
def test_a_patient_goes_by_name_or_by_salted_id_and_only_in_the_data_sets_that_have_it(folder: Path, name: str | None):
    before = contents(folder)
    assert remove_patients(folder, [name or patient_id("novak", "e")]) == RemovalResult(1, 2, 1)
    assert "e-train-000001.tar" not in files(folder)
    assert contents(folder) == without(before, "novak")


def test_an_id_means_one_data_set(folder: Path):
    before = contents(folder)
    assert remove_patients(folder, [patient_id("smith", "e")]).cases == 1
    assert set(before) - set(contents(folder)) == {f"e-{case_id(SCANS[6])}-{first:05d}" for first in (0, 3)}


def test_an_unknown_name_changes_nothing_and_lists_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = files(folder)
    with pytest.raises(UserError, match="none of its 7 patients is 'smit'.*MEDSAM2_SALT") as error:
        remove_patients(folder, ["jones", "smit"])
    assert not any(scan.patient in str(error.value).replace("'smit'", "") for scan in SCANS)
    monkeypatch.setenv("MEDSAM2_SALT", "another salt")
    with pytest.raises(UserError, match="none of its 7 patients is 'smith'"):
        remove_patients(folder, ["smith"])
    assert files(folder) == before and not (folder / ".staging").exists()


def test_everybody_may_go(folder: Path):
    remove_patients(folder, sorted({scan.patient for scan in SCANS}))
    assert set(files(folder)) == {SUMMARY_FILE, INDEX_FILE} and len(read_index(folder)) == 0
    with pytest.raises(UserError, match="none of its 0 patients is 'smith'"):
        remove_patients(folder, ["smith"])


def test_states_of_sources_and_failed_cases_of_the_patient_go_too(folder: Path):
    states = {f"{name}{n}": {"patient": patient_id(name), "stamp": "", "content": ""}
              for name in ("smith", "jones") for n in range(2)}  # fmt: skip
    (folder / "sources.json").write_text(json.dumps(states))
    lines = [{"dataset": "d", "case": f"{p}9", "patient": patient_id(p), "files": []} for p in ("smith", "jones")]
    (folder / "failures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    remove_patients(folder, ["smith"])
    assert set(json.loads((folder / "sources.json").read_text())) == {"jones0", "jones1"}
    failures = (folder / "failures.jsonl").read_text()
    assert "smith" not in failures and "jones9" in failures


def killed_at(step: int, folder: Path, names: Sequence[str]) -> None:
    """Run it in this process, which dies before its `step`th change of the folder."""
    left = [step]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return function(*args, **kwargs)

        return wrapped

    os.replace = counted(os.replace)
    Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]
    remove_patients(folder, names)
    os._exit(0)


def test_a_kill_at_any_point_leaves_the_old_or_the_new_state_and_again_finishes_it(folder: Path, tmp_path: Path):
    before = contents(folder)
    after = without(before, "smith", "weber")
    fork = multiprocessing.get_context("fork")
    seen = []
    for step in range(50):
        trial = tmp_path / f"killed{step}"
        shutil.copytree(folder, trial)
        process = fork.Process(target=killed_at, args=(step, trial, ["smith", "weber"]))
        process.start()
        process.join()
        state = contents(trial)
        assert state in (before, after)
        seen.append(state == after)
        if process.exitcode == 0:
            break
        if "removal.json" in files(trial) or state == before:
            assert remove_patients(trial, ["smith", "weber"]).cases in (0, 4)
        assert contents(trial) == after and whole(trial)
        assert {path.name for path in trial.iterdir()} <= {
            SUMMARY_FILE,
            INDEX_FILE,
            ".staging",
            *summary(trial)["shards"],
        }
    assert process.exitcode == 0 and seen == sorted(seen) and seen.count(False) >= 6 and seen.count(True) >= 4


def test_another_removal_finishes_one_that_was_killed(folder: Path):
    process = multiprocessing.get_context("fork").Process(target=killed_at, args=(6, folder, ["smith"]))
    process.start()
    process.join()
    assert process.exitcode == 9 and "removal.json" in files(folder)
    before = contents(folder)
    assert remove_patients(folder, ["lopez"]).cases == 4
    assert contents(folder) == without(before, "smith", "lopez")


def test_a_full_disk_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    before, real = files(folder), os.fsync
    synced = []

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 5:  # file and folder of the journal, file and folder of a first shard, a second shard
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="No space left on device; fix that and run the same command again"):
        remove_patients(folder, ["smith"])
    assert files(folder) == before


def test_damage_is_not_copied(folder: Path):
    path = folder / "d-train-000001.tar"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    before = files(folder)
    with pytest.raises(UserError, match="d-train-000001.tar: is damaged or missing .*sha256"):
        remove_patients(folder, ["smith"])
    path.unlink()
    with pytest.raises(UserError, match="d-train-000001.tar: is damaged or missing .*No such file"):
        remove_patients(folder, ["smith"])
    assert files(folder) == {name: content for name, content in before.items() if name != path.name}


def test_nobody_else_may_be_writing_and_no_prepare_unfinished(folder: Path):
    staging = folder / ".staging"
    staging.mkdir()
    with open(staging / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another command is writing"):
            remove_patients(folder, ["smith"])
    (staging / "d-train-0123.part").write_bytes(b"smith")
    with pytest.raises(UserError, match="prepare was interrupted"):
        remove_patients(folder, ["smith"])
    assert (staging / "d-train-0123.part").exists() and "d-train-000000.tar" in files(folder)


def test_shards_from_elsewhere_with_long_headers_and_free_names(tmp_path: Path):
    """Tars that another program wrote, indexed in place: pax headers, extra members, a name of its own."""
    folder = build(tmp_path / "shards", [replace(scan, shard="mine-train-0.tar") for scan in SCANS])
    index = read_index(folder).table.to_pylist()
    packed = io.BytesIO()
    with tarfile.open(folder / "mine-train-0.tar") as old:
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new:
            for member in old.getmembers():
                info = tarfile.TarInfo(member.name)
                info.size, info.pax_headers = member.size, {"comment": "é" * 700}
                new.addfile(info, old.extractfile(member))
                if member.name.endswith(".json"):
                    note = tarfile.TarInfo(member.name.replace(".json", ".txt"))
                    note.size = 4
                    new.addfile(note, io.BytesIO(b"note"))
        places = [member.offset_data for member in old.getmembers()]
    with tarfile.open(fileobj=io.BytesIO(packed.getvalue())) as new:
        there = [member.offset_data for member in new.getmembers() if not member.name.endswith(".txt")]
    moved = dict(zip(places, there, strict=True))
    for row in index:
        row["json_offset"] = moved[row["json_offset"]]
        row |= {name: [moved[at] for at in row[name]] for name in ("frame_offset", "mask_offset")}
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "free name.tar").write_bytes(packed.getvalue())
    rows = [{**row, "shard": "free name.tar"} for row in index]
    write_index(folder, rows, summarise(rows, {}, {}, 0))
    before = contents(folder)
    assert remove_patients(folder, ["smith"]).shards == 1
    assert contents(folder) == without(before, "smith") and "free name.tar" not in files(folder)
    with tarfile.open(folder / "free name-000000.tar") as archive:
        assert sum(name.endswith(".txt") for name in archive.getnames()) == 10


def test_shards_at_a_url_are_refused_with_what_to_do(folder: Path):
    with pytest.raises(UserError, match="copy the shards here"):
        remove_patients("memory://somewhere/shards", ["smith"])


def test_no_shards_there_is_said(tmp_path: Path):
    with pytest.raises(UserError, match="no such folder of shards"):
        remove_patients(tmp_path / "gone", ["smith"])
    assert not (tmp_path / "gone").exists()
