from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medsam2.cases.case import CaseError
from medsam2.cases.layouts import find_cases, load_case
from medsam2.cases.settings import DatasetSettings, SettingsBook
from medsam2.errors import UserError


def msd(write, folder: Path, cases: int = 2) -> Path:
    folder.mkdir(parents=True)
    entries = []
    for number in range(cases):
        image, mask = write.scan(number)
        write.volume(folder / "imagesTr" / f"liver_{number}.nii.gz", image)
        write.volume(folder / "labelsTr" / f"liver_{number}.nii.gz", mask)
        entries.append({"image": f"./imagesTr/liver_{number}.nii.gz", "label": f"./labelsTr/liver_{number}.nii.gz"})
    description = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "training": entries,
        "test": ["./imagesTs/liver_9.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def change(folder: Path, **changes: object) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def brats(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """One case whose fourth axis are four kinds of MR."""
    import SimpleITK as sitk

    image = np.random.default_rng(0).integers(0, 200, (4, 5, 16, 20)).astype(np.uint8)
    mask = np.zeros((5, 16, 20), np.uint8)
    mask[1:3, 4:9, 5:11] = 1
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    volumes = [sitk.GetImageFromArray(volume) for volume in image]
    sitk.WriteImage(sitk.JoinSeries(volumes), str(folder / "imagesTr" / "BRATS_001.nii.gz"))
    sitk.WriteImage(sitk.GetImageFromArray(mask), str(folder / "labelsTr" / "BRATS_001.nii.gz"))
    description = {
        "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        "labels": {"0": "background", "1": "edema"},
        "training": [{"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_001.nii.gz"}],
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return image, mask


def test_a_case_has_image_mask_names_and_modality(tmp_path: Path, write):
    refs = find_cases(msd(write, tmp_path / "Task03_Liver"))
    assert [(r.dataset, r.case_id, r.layout) for r in refs] == [
        ("Task03_Liver", "liver_0", "msd"),
        ("Task03_Liver", "liver_1", "msd"),
    ]
    case = load_case(refs[1])
    image, mask = write.scan(1)
    assert np.array_equal(case.image, image)
    assert np.array_equal(case.planes[0], mask)
    assert [(label.id, label.name) for label in case.labels] == [(1, "liver"), (2, "cancer")]
    assert case.modality == "CT"


def test_the_fourth_axis_are_channels_where_several_modalities_are_named(tmp_path: Path):
    image, mask = brats(tmp_path / "Task01")
    refs = find_cases(tmp_path / "Task01")
    assert [(r.case_id, r.patient_id, r.modality) for r in refs] == [
        (f"BRATS_001_000{n}", "BRATS_001", "MR") for n in range(4)
    ]
    case = load_case(refs[2])
    assert case.kind == "volume"
    assert np.array_equal(case.image, image[2])
    assert np.array_equal(case.planes[0], mask)


def test_the_first_channel_of_a_file_can_stand_alone(tmp_path: Path):
    image, _ = brats(tmp_path / "Task01")
    (ref,) = find_cases(tmp_path / "Task01", book=SettingsBook(common=DatasetSettings(channels="first")))
    assert ref.case_id == "BRATS_001"
    assert np.array_equal(load_case(ref).image, image[0])


@pytest.mark.parametrize("text", ["../../etc/passwd", "/etc/passwd", "./imagesTr/../../other/x.nii.gz"])
@pytest.mark.parametrize("key", ["image", "label"])
def test_a_path_that_leads_out_of_the_data_set_is_refused(tmp_path: Path, write, text: str, key: str):
    folder = msd(write, tmp_path / "Task03")
    good = {"image": "./imagesTr/liver_0.nii.gz", "label": "./labelsTr/liver_0.nii.gz"}
    change(folder, training=[good, good | {key: text}])
    with pytest.raises(UserError, match="leads out of"):
        find_cases(folder)


def test_a_path_that_comes_back_inside_is_read(tmp_path: Path, write):
    folder = msd(write, tmp_path / "Task03")
    change(folder, training=[{"image": "labelsTr/../imagesTr/liver_0.nii.gz", "label": "labelsTr/liver_0.nii.gz"}])
    load_case(find_cases(folder)[0])


def test_files_that_macos_leaves_are_no_cases(tmp_path: Path, write):
    folder = msd(write, tmp_path / "Task03", cases=1)
    (folder / "imagesTr" / "._liver_0.nii.gz").write_bytes(b"junk")
    entries = json.loads((folder / "dataset.json").read_text())["training"]
    change(folder, training=[*entries, {"image": "imagesTr/._liver_0.nii.gz", "label": "labelsTr/._liver_0.nii.gz"}])
    assert [ref.case_id for ref in find_cases(folder)] == ["liver_0"]


def test_a_listed_file_that_is_missing_fails_by_name_and_alone(tmp_path: Path, write):
    folder = msd(write, tmp_path / "Task03")
    (folder / "labelsTr" / "liver_0.nii.gz").unlink()
    refs = find_cases(folder)
    with pytest.raises(CaseError, match=r"labelsTr/liver_0\.nii\.gz: no such file"):
        load_case(refs[0])
    load_case(refs[1])


def test_a_value_that_the_data_set_does_not_name_is_refused(tmp_path: Path, write):
    folder = msd(write, tmp_path / "Task03", cases=1)
    change(folder, labels={"0": "background", "1": "liver"})
    with pytest.raises(CaseError, match=r"the mask holds \[2\]"):
        load_case(find_cases(folder)[0])
