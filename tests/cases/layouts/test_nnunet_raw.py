from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medsam2.cases.case import CaseError
from medsam2.cases.layouts import find_cases
from medsam2.cases.layouts.nnunet_raw import modality_of
from medsam2.errors import UserError


def describe(folder: Path, **changes: object) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_case_has_image_mask_names_and_spacing(tmp_path: Path, write):
    case = find_cases(write.nnunet(tmp_path / "Dataset001"))[2].load()
    image, mask = write.scan(2)
    assert np.array_equal(case.image, image)
    assert np.array_equal(case.planes[0], mask)
    assert [(label.id, label.name) for label in case.labels] == [(1, "organ"), (2, "lesion")]
    assert case.modality == "CT"
    assert case.spacing == pytest.approx((4, 1, 1))


@pytest.mark.parametrize(
    ("channel", "modality"),
    [
        ("CT", "CT"),
        ("MRI", "MR"),
        ("T1_Gd", "MR"),
        ("T2w", "MR"),
        ("PET", "PT"),
        ("noNorm", ""),
        ("zscore", ""),
        ("", ""),
    ],
)
def test_channel_names_give_a_modality_and_never_a_guess(channel: str, modality: str):
    assert modality_of(channel) == modality


def test_overlapping_regions_get_planes_of_their_own(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001", cases=1)
    describe(folder, labels={"background": 0, "whole": [1, 2], "lesion": 2, "organ": 1, "ignore": 3})
    case = find_cases(folder)[0].load()
    mask = write.scan(0)[1]
    assert case.planes.shape[0] == 2
    assert np.array_equal(case.planes[1], (mask > 0).astype(np.uint8))
    assert {(label.name, label.plane) for label in case.labels} == {("lesion", 0), ("organ", 0), ("whole", 1)}


def test_regions_alone_leave_no_empty_plane(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001", cases=1)
    describe(folder, labels={"background": 0, "whole": [1, 2], "core": [2, 1]})
    case = find_cases(folder)[0].load()
    assert [(label.id, label.name, label.plane) for label in case.labels] == [(1, "whole", 0), (1, "core", 1)]


def test_a_value_that_the_data_set_does_not_name_is_refused(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001", cases=1)
    describe(folder, labels={"background": 0, "organ": 1})
    with pytest.raises(CaseError, match=r"smith_000\.nii\.gz: the mask holds \[2\]"):
        find_cases(folder)[0].load()


def test_an_image_without_mask_and_a_mask_without_image_fail_by_name(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001", cases=3)
    (folder / "labelsTr" / "smith_000.nii.gz").unlink()
    (folder / "imagesTr" / "smith_001_0000.nii.gz").unlink()
    refs = find_cases(folder)
    assert len(refs) == 3
    with pytest.raises(CaseError, match=r"labelsTr/smith_000\.nii\.gz: no such file"):
        refs[0].load()
    with pytest.raises(CaseError, match=r"imagesTr/smith_001_0000\.nii\.gz: no such file"):
        refs[1].load()
    refs[2].load()


def test_a_broken_dataset_json_is_named(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001", cases=1)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json: not readable as json"):
        find_cases(folder)
