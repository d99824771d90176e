from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset

from medsam2.cases.layouts import find_cases
from medsam2.cases.settings import DatasetSettings, SettingsBook
from medsam2.errors import UserError
from medsam2.shards.index import read_index
from medsam2.shards.load import load_segment
from medsam2.shards.prepare.plan import Plan, make_plan
from medsam2.shards.prepare.run import PrepareOptions, prepare
from medsam2.shards.prepare.stage import Job, Recipe, run_job
from medsam2.shards.record import decode_frame, decode_mask


def content(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("codec", ["zstd", "lz4", "png"])
def test_webdataset_reads_the_same_frames_and_masks(tmp_path: Path, write, codec: str):
    folder = tmp_path / "shards"
    prepare(write.everything(tmp_path / "raw"), folder, PrepareOptions(recipe=Recipe(codec=codec)))  # type: ignore[arg-type]
    ending, mask_ending = {"zstd": ("zst", "zst"), "lz4": ("lz4", "lz4"), "png": ("png", "zst")}[codec]
    index = read_index(folder)
    rows = {index.row(i).key: i for i in range(len(index))}
    seen = set()
    for sample in webdataset.WebDataset([str(p) for p in sorted(folder.glob("*.tar"))], shardshuffle=False):
        row, image, planes = load_segment(index, rows[sample["__key__"]])
        record = json.loads(sample["json"])
        assert record["frames"] == row.frames
        assert {f"{t:04d}.{ending}" for t in range(len(row.frames))} <= set(sample)
        for t in range(len(row.frames)):
            frame = decode_frame(sample[f"{t:04d}.{ending}"], row.codec, row.frame_shape)
            mask = decode_mask(
                sample[f"{t:04d}.mask.{mask_ending}"], row.mask_codec, planes[:, t].shape, row.mask_dtype
            )
            assert np.array_equal(frame, image[t])
            assert np.array_equal(mask, planes[:, t])
        seen.add(row.key)
    assert seen == set(rows)


def test_train_is_cut_around_labels_and_val_is_whole(shards: Path):
    index = read_index(shards)
    rows = [index.row(i) for i in range(len(index))]
    assert {row.split for row in rows} == {"train", "val"}
    for row in rows:
        assert re.fullmatch(rf"{row.dataset}-{row.case}-{row.frames[0]:05d}", row.key)
        assert row.shard.startswith(f"{row.dataset}-{row.split}-00000")
        if row.split == "val":
            assert row.frames == list(range(row.original_shape[0]))


def test_the_index_for_people_agrees_with_the_files(shards: Path):
    summary = json.loads((shards / "index.json").read_text())
    for name, entry in summary["shards"].items():
        assert (shards / name).stat().st_size == entry["bytes"]
        assert hashlib.sha256((shards / name).read_bytes()).hexdigest() == entry["sha256"]
    assert summary["counts"]["cases"] == 11
    assert summary["counts"]["patients"] == 10
    assert summary["configuration"]["split"] == {"train": 0.8, "val": 0.2}
    assert {p.name for p in shards.iterdir()} == {"index.arrow", "index.json", "sources.json", *summary["shards"]}


def test_names_of_patients_and_cases_are_nowhere_in_what_is_written(shards: Path, raw_folder: Path):
    names = {name for ref in find_cases(raw_folder) for name in (ref.case_id, ref.patient_id) if len(name) > 6}
    assert {"smith_000", "CT_Lesion_000015_01_01_081-093"} <= names
    for path in shards.iterdir():
        content = path.read_bytes()
        for name in names:
            assert name.encode() not in content, (path.name, name)
        assert str(raw_folder).encode() not in content


def test_two_runs_in_another_order_and_number_of_processes_give_equal_bytes(
    tmp_path: Path, raw_folder: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("medsam2.shards.prepare.pool.BYTES_PER_WORKER", 1)
    prepare(raw_folder, tmp_path / "shards", PrepareOptions(workers=2))
    assert content(tmp_path / "shards") == content(shards)


def test_another_salt_changes_names_and_not_the_split(
    tmp_path: Path, raw_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    before = make_plan(raw_folder, PrepareOptions()).jobs
    monkeypatch.setenv("MEDSAM2_SALT", "other")
    after = make_plan(raw_folder, PrepareOptions()).jobs
    assert [job.split for job in before] == [job.split for job in after]
    assert not {job.case for job in before} & {job.case for job in after}


def test_a_shard_is_closed_before_it_grows_beyond_its_size(tmp_path: Path, raw_folder: Path):
    prepare(raw_folder, tmp_path / "shards", PrepareOptions(shard_bytes=100_000))
    index = read_index(tmp_path / "shards")
    names = {index.row(i).shard for i in range(len(index))}
    assert "Dataset001_Test-train-000001.tar" in names
    for number in range(len(index)):
        load_segment(index, number)


KILLED = """
import sys
from pathlib import Path
from medsam2.shards.prepare.run import PrepareOptions, prepare
prepare(Path(sys.argv[1]), Path(sys.argv[2]), PrepareOptions())
"""


def staged_before(job: Job, staging: Path) -> bool:
    """Stage a case; whether the part of an earlier run was kept."""
    before = [path.stat().st_mtime_ns for path in staging.glob(f"*{job.case}.part")]
    assert not run_job(job, Recipe(), staging).error
    return before == [path.stat().st_mtime_ns for path in staging.glob(f"*{job.case}.part")]


@pytest.mark.parametrize("staged", [1, 6])
def test_killed_and_run_again_it_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, raw_folder: Path, shards: Path, staged: int
):
    out = tmp_path / "shards"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(raw_folder), str(out)])
    deadline = time.monotonic() + 60
    while len(list(out.glob(".staging/*-*.json"))) < staged and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if not (out / "index.arrow").exists():
        jobs = make_plan(raw_folder, PrepareOptions()).jobs
        done = [staged_before(job, out / ".staging") for job in jobs if staged > 1]
        assert sum(done) >= staged - 1
    prepare(raw_folder, out, PrepareOptions())
    assert content(out) == content(shards)


def test_a_staged_case_that_was_damaged_or_whose_source_changed_is_made_again(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001", cases=1)
    staging = tmp_path / "staging"
    staging.mkdir()
    job = make_plan(folder, PrepareOptions()).jobs[0]
    assert not staged_before(job, staging)
    assert staged_before(job, staging)
    part = next(staging.glob("*.part"))
    damaged = bytearray(part.read_bytes())
    damaged[5000] ^= 1
    part.write_bytes(damaged)
    assert not staged_before(job, staging)
    os.utime(folder / "labelsTr" / "smith_000.nii.gz", (1, 1))
    assert not staged_before(job, staging)


def test_a_failing_case_is_reported_by_name_and_the_rest_goes_on(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001")
    broken = folder / "imagesTr" / "smith_001_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:2000])
    write.volume(folder / "labelsTr" / "smith_002.nii.gz", np.zeros((12, 40, 48), np.uint8))
    result = prepare(folder, tmp_path / "shards", PrepareOptions())
    entries = [json.loads(line) for line in (tmp_path / "shards" / "failures.jsonl").read_text().splitlines()]
    assert [entry["case"] for entry in entries] == ["smith_001", "smith_002"]
    assert "smith_001_0000.nii.gz: cut short" in entries[0]["reason"]
    assert "no labelled structure" in entries[1]["reason"]
    assert len(result.failures) == 2
    assert [set(entry) for entry in entries] == [{"dataset", "case", "patient", "files", "reason", "remedy"}] * 2
    assert entries[0]["patient"] == result.failures[0].job.patient != "smith_001"
    assert "prepare into another --out" in entries[1]["remedy"]
    summary = json.loads((tmp_path / "shards" / "index.json").read_text())
    assert summary["failed_cases"] == 2
    assert summary["counts"]["cases"] == 2


def test_strict_stops_at_the_first_failure_and_publishes_nothing(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001")
    (folder / "labelsTr" / "smith_001.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"smith_001\.nii\.gz.*--strict"):
        prepare(folder, tmp_path / "shards", PrepareOptions(strict=True))
    assert not (tmp_path / "shards" / "index.arrow").exists()


def test_a_source_without_one_good_case_leaves_a_folder_that_can_be_used_again(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001", channel="noNorm")
    with pytest.raises(UserError, match=r"none of 4 cases.*give --modality"):
        prepare(folder, tmp_path / "shards", PrepareOptions())
    prepare(folder, tmp_path / "shards", PrepareOptions(modality="MR"))
    assert not (tmp_path / "shards" / "failures.jsonl").exists()


def test_a_folder_of_something_else_or_of_another_configuration_is_refused(
    tmp_path: Path, raw_folder: Path, shards: Path
):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="already exists and is not empty"):
        prepare(raw_folder, out, PrepareOptions())
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    before = content(shards)
    with pytest.raises(UserError, match="was prepared with seed=0, now it is 1"):
        prepare(raw_folder, shards, PrepareOptions(seed=1))
    with pytest.raises(UserError, match=r"was prepared with settings\.common\.min_voxels=None, now it is 9"):
        prepare(raw_folder, shards, PrepareOptions(book=SettingsBook(common=DatasetSettings(min_voxels=9))))
    assert content(shards) == before


def test_a_split_file_decides_and_leaves_out_the_rest(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001")
    (tmp_path / "split.json").write_text(json.dumps({"train": ["smith_003"], "test": ["smith_000"]}))
    result = prepare(folder, tmp_path / "shards", PrepareOptions(split_file=tmp_path / "split.json"))
    assert result.num_left_out == 2
    assert {(g["split"], g["cases"]) for g in result.summary["groups"]} == {("train", 1), ("test", 1)}


@pytest.mark.parametrize("window", [(0, 100), "lung"])
def test_a_window_for_data_without_ct_is_refused(tmp_path: Path, write, window: object):
    book = SettingsBook(common=DatasetSettings(window=window))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--window applies to CT, but the data are US"):
        prepare(write.davis(tmp_path / "echo"), tmp_path / "s", PrepareOptions(book=book))
    assert not (tmp_path / "s").exists()


def test_a_preset_for_one_data_set_without_ct_is_refused(raw_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"datasets\.echo: window applies to CT"):
        book = SettingsBook(datasets={"echo": {"window": "lung"}})
        prepare(raw_folder, tmp_path / "s", PrepareOptions(book=book))


def test_the_index_says_what_was_asked_for_and_where_the_data_come_from(tmp_path: Path, write):
    write.nnunet(tmp_path / "raw" / "Dataset001")
    common = DatasetSettings(window="lung", source="a hospital", licence="CC0")
    result = prepare(tmp_path / "raw", tmp_path / "s", PrepareOptions(book=SettingsBook(common=common)))
    stated = {"window": "lung", "source": "a hospital", "licence": "CC0"}
    assert result.summary["configuration"]["settings"] == {"common": stated}
    origin = {"source": "a hospital", "licence": "CC0", "layout": "nnunet_raw"}
    assert result.summary["datasets"] == {"Dataset001": origin}


def test_a_licence_that_the_data_set_states_is_believed_where_the_user_says_nothing(tmp_path: Path, write):
    write.nnunet(tmp_path / "raw" / "Dataset001")
    path = tmp_path / "raw" / "Dataset001" / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reference": "Dr. Smith", "license": "CC-BY 4.0"}))
    for setting, licence in (("", "CC-BY-4.0"), ("CC0", "CC0")):
        options = PrepareOptions(book=SettingsBook(common=DatasetSettings(licence=setting)))
        origin = {"source": "", "licence": licence, "layout": "nnunet_raw"}
        content = prepare(tmp_path / "raw", tmp_path / f"shards{setting}", options).summary["datasets"]
        assert content == {"Dataset001": origin}


def test_what_was_found_and_how_far_it_is_can_be_followed(tmp_path: Path, raw_folder: Path):
    plans: list[Plan] = []
    steps: list[tuple[str, int, int, int]] = []
    prepare(raw_folder, tmp_path / "s", PrepareOptions(), plans.append, lambda *step: steps.append(step))
    assert "echo, davis_frames, US: 2 cases" in plans[0].datasets
    assert [step for step in steps if step[0] == "preparing"] == [("preparing", n, 11, 0) for n in range(1, 12)]
    assert steps[-1][0] == "writing"


def test_odd_names_of_data_sets_give_plain_keys(tmp_path: Path, write):
    write.davis(tmp_path / "my study v1.2 (ä)")
    prepare(tmp_path, tmp_path / "shards", PrepareOptions())
    index = read_index(tmp_path / "shards")
    for number in range(len(index)):
        assert re.fullmatch(r"[A-Za-z0-9_-]+", index.row(number).key)


def test_the_real_lesions_keep_a_patient_in_one_split(tmp_path: Path, test_data: Path):
    prepare(test_data / "ct" / "recist", tmp_path / "shards", PrepareOptions())
    index = read_index(tmp_path / "shards")
    rows = [index.row(i) for i in range(len(index))]
    assert len({(row.patient, row.split) for row in rows}) == 3
    assert {row.split for row in rows} == {"train", "val"}
    assert {row.window for row in rows} == {"as stored"}
    _, _, planes = load_segment(index, 0)
    assert planes.any()
