from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medsam2.cases.case import CaseError
from medsam2.cases.layouts import find_cases, load_case
from medsam2.cases.layouts.monai_datalist import recognise
from medsam2.errors import UserError


def scans(write, folder: Path, count: int = 4) -> list[dict[str, object]]:
    entries: list[dict[str, object]] = []
    for number in range(count):
        image, mask = write.scan(number)
        write.volume(folder / "data" / f"img{number}.nii.gz", image)
        write.volume(folder / "data" / f"seg{number}.nii.gz", mask)
        entries.append({"image": f"data/img{number}.nii.gz", "label": f"data/seg{number}.nii.gz"})
    return entries


def write_list(folder: Path, name: str = "datalist.json", **content: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder / name


def test_lists_prescribe_the_splits(tmp_path: Path, write):
    a, b, c, d = scans(write, tmp_path)
    write_list(tmp_path, training=[a, b], validation=[c], test=[d, {"image": "data/img0.nii.gz"}, "x.nii.gz"])
    refs = find_cases(tmp_path, modality="CT")
    assert [(r.case_id, r.split) for r in refs] == [
        ("img0", "train"),
        ("img1", "train"),
        ("img2", "val"),
        ("img3", "test"),
    ]
    assert np.array_equal(load_case(refs[2]).image, write.scan(2)[0])


def test_fold_0_is_validation_where_no_list_is(tmp_path: Path, write):
    entries = scans(write, tmp_path)
    write_list(tmp_path, training=[entry | {"fold": number % 2} for number, entry in enumerate(entries)])
    assert [r.split for r in find_cases(tmp_path, modality="CT")] == ["val", "train", "val", "train"]


def test_without_folds_the_split_is_left_open(tmp_path: Path, write):
    write_list(tmp_path, training=scans(write, tmp_path))
    assert {r.split for r in find_cases(tmp_path, modality="CT")} == {""}


def test_names_and_modality_in_the_list_are_used(tmp_path: Path, write):
    labels = {"0": "background", "1": "organ", "2": "lesion"}
    write_list(tmp_path, training=scans(write, tmp_path, 1), labels=labels, modality={"0": "CT"})
    case = load_case(find_cases(tmp_path)[0])
    assert [label.name for label in case.labels] == ["organ", "lesion"]
    assert case.modality == "CT"


def test_a_list_can_be_the_source_itself_and_two_in_a_folder_must_be(tmp_path: Path, write):
    a, b, *_ = scans(write, tmp_path)
    first = write_list(tmp_path, "fold0.json", training=[a])
    write_list(tmp_path, "fold1.json", training=[b])
    assert [r.case_id for r in find_cases(first, modality="CT")] == ["img0"]
    with pytest.raises(UserError, match=r"fold0\.json, fold1\.json"):
        find_cases(tmp_path)


def test_several_images_of_an_entry_are_channels(tmp_path: Path, write):
    entries = []
    for patient in ("p1", "p2"):
        image, mask = write.scan(1)
        for kind in ("flair", "t1"):
            write.volume(tmp_path / patient / f"{patient}_{kind}.nii.gz", image)
        write.volume(tmp_path / patient / "seg.nii.gz", mask)
        images = [f"{patient}/{patient}_{kind}.nii.gz" for kind in ("flair", "t1")]
        entries.append({"image": images, "label": f"{patient}/seg.nii.gz"})
    write_list(tmp_path, training=entries)
    refs = find_cases(tmp_path, modality="MR")
    assert [(r.case_id, r.patient_id) for r in refs] == [
        ("p1_0000", "p1"),
        ("p1_0001", "p1"),
        ("p2_0000", "p2"),
        ("p2_0001", "p2"),
    ]
    load_case(refs[3])


@pytest.mark.parametrize("text", ["../../etc/passwd", "/etc/passwd", "data/../../secret.nii.gz"])
def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path: Path, write, text: str):
    entries = scans(write, tmp_path / "set", 1)
    write_list(tmp_path / "set", training=[*entries, {"image": text, "label": "data/seg0.nii.gz"}])
    with pytest.raises(UserError, match="leads out of"):
        find_cases(tmp_path / "set")


def test_an_entry_without_label_and_a_missing_file_fail_by_name(tmp_path: Path, write):
    a, b, *_ = scans(write, tmp_path, 2)
    gone = {"image": "data/gone.nii.gz", "label": "data/seg0.nii.gz"}
    write_list(tmp_path, training=[a, {"image": b["image"]}, gone])
    refs = {r.case_id: r for r in find_cases(tmp_path, modality="CT")}
    with pytest.raises(CaseError, match=r"gone\.nii\.gz: no such file"):
        load_case(refs["gone"])
    with pytest.raises(CaseError, match=r"training\[1\] .* has no label"):
        load_case(refs["img1"])
    load_case(refs["img0"])


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"training": 3}', '{"training": []}', '{"training": ["a.nii.gz"]}', '{"training": [{"image": "a"}]}'],
)
def test_other_json_is_no_data_list(tmp_path: Path, content: str):
    (tmp_path / "some.json").write_text(content)
    assert not recognise(tmp_path)
