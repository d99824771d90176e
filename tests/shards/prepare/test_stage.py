from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from medsam2.cases.layouts import find_cases
from medsam2.cases.settings import DatasetSettings, LabelRules, SettingsBook
from medsam2.shards.index import read_index
from medsam2.shards.load import load_record, load_segment
from medsam2.shards.prepare.run import PrepareOptions, prepare
from medsam2.shards.prepare.stage import Recipe, make_job, run_job


def test_several_windows_give_a_clip_each_under_one_patient(tmp_path: Path, write):
    book = SettingsBook(common=DatasetSettings(windows=("abdomen", "lung")))
    prepare(write.nnunet(tmp_path / "raw", cases=2), tmp_path / "out", PrepareOptions(book=book))
    index = read_index(tmp_path / "out")
    rows = [index.row(i) for i in range(len(index))]
    assert {row.window for row in rows} == {"-160:240 HU", "-1350:150 HU"}
    assert len({row.case for row in rows}) == 4
    by_patient = {(row.patient, row.content_hash) for row in rows}
    assert len(by_patient) == 2
    assert len({row.split for row in rows if row.patient == rows[0].patient}) == 1


def test_instances_become_objects_and_keep_their_name(tmp_path: Path, write):
    source = write.nnunet(tmp_path / "raw", cases=2)
    for number in range(2):
        mask = write.scan(number)[1]
        mask[8, 30:34, 30:34] = 2  # a second lesion, far from the first
        write.volume(source / "labelsTr" / f"smith_{number:03d}.nii.gz", mask)
    book = SettingsBook(common=DatasetSettings(labels=LabelRules(instances=("lesion",))))
    prepare(source, tmp_path / "out", PrepareOptions(book=book))
    index = read_index(tmp_path / "out")
    row, _, planes = load_segment(index, 0)
    assert sorted(o.name for o in row.objects) == ["lesion", "lesion", "organ"]
    for obj in row.objects:
        assert [(planes[obj.plane, t] == obj.value).sum() for t in range(planes.shape[1])] == obj.pixels


def test_a_recist_line_reaches_its_object_on_the_frame_of_its_segment(tmp_path: Path, write):
    source = write.nnunet(tmp_path / "raw", cases=1)
    ref = find_cases(source)[0]
    # the lesion (rows 12-15, columns 14-19 of slices 5 and 6); the axial stack of the test is stored upright
    ref = replace(ref, recist=((5, 14.0, 12.0, 19.0, 15.0, "lesion"), (5, 0.0, 0.0, 3.0, 3.0, "nobody")))
    done = run_job(make_job(ref, "train", b"salt"), Recipe(margin=2), tmp_path)
    assert not done.error
    lines = {obj["name"]: obj["lines"] for obj in done.rows[0]["objects"]}
    first = done.rows[0]["frames"][0]
    assert np.allclose(lines["lesion"], [5 - first, 14.0, 12.0, 19.0, 15.0]) and lines["organ"] == []


def test_the_record_keeps_the_way_back_and_the_histogram(shards: Path):
    index = read_index(shards)
    for number in range(len(index)):
        record = load_record(index, number)
        assert sorted(record.axes) == [0, 1, 2]
        frames, height, width = record.shape
        assert sum(record.histogram) == frames * height * width * record.channels


def test_an_error_that_nobody_foresaw_is_told_without_the_text_of_the_file(tmp_path: Path, write, monkeypatch):
    ref = find_cases(write.nnunet(tmp_path / "raw", cases=1))[0]

    def fail(self: object) -> None:
        raise KeyError("PATIENT^CANARY")

    monkeypatch.setattr("medsam2.shards.prepare.stage.load_case", fail)
    done = run_job(make_job(ref, "train", b"salt"), Recipe(), tmp_path)
    assert "KeyError" in done.error and "CANARY" not in done.error
