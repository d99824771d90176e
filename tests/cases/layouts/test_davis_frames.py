from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medsam2.cases.case import CaseError
from medsam2.cases.layouts import find_cases


def test_a_clip_has_frames_masks_names_and_time(tmp_path: Path, write):
    case = find_cases(write.davis(tmp_path / "echo"))[1].load()
    image, mask = write.clip(1)
    assert case.image.shape == image.shape
    assert np.array_equal(case.planes[0], mask)
    assert [(label.id, label.name) for label in case.labels] == [(1, "organ")]
    assert case.spacing == pytest.approx((0.1, 0.3, 0.3))
    assert (case.modality, case.kind, case.affine) == ("US", "clip", None)


def test_the_resolution_folder_of_davis_is_passed(tmp_path: Path, write):
    folder = write.davis(tmp_path / "echo")
    for part in ("JPEGImages", "Annotations"):
        (folder / part).rename(folder / "x")
        (folder / part).mkdir()
        (folder / "x").rename(folder / part / "480p")
    assert [ref.case_id for ref in find_cases(folder)] == ["clip0", "clip1"]


def test_without_meta_json_objects_are_numbered_and_the_modality_is_asked_for(tmp_path: Path, write):
    folder = write.davis(tmp_path / "echo", clips=1)
    (folder / "meta.json").unlink()
    with pytest.raises(CaseError, match="give --modality"):
        find_cases(folder)[0].load()
    case = find_cases(folder, modality="US")[0].load()
    assert [label.name for label in case.labels] == ["object_1"]


def test_patients_of_several_clips_come_from_meta_json(tmp_path: Path, write):
    meta = {"modality": "US", "labels": {"organ": 1}, "patients": {"clip0": "p", "clip1": "p"}}
    assert {ref.patient_id for ref in find_cases(write.davis(tmp_path / "echo", meta=meta))} == {"p"}


def test_void_pixels_are_background(tmp_path: Path, write):
    folder = write.davis(tmp_path / "echo", clips=1)
    path = folder / "Annotations" / "clip0" / "00003.png"
    mask = write.clip(0)[1][3]
    mask[0] = 255
    write.palette(path, mask)
    assert find_cases(folder)[0].load().planes.max() == 1


@pytest.mark.parametrize("part", ["mask", "name"])
def test_a_frame_without_mask_and_an_unnamed_value_are_refused(tmp_path: Path, write, part: str):
    folder = write.davis(tmp_path / "echo", clips=1)
    path = folder / "Annotations" / "clip0" / "00004.png"
    if part == "mask":
        path.unlink()
        match = r"1 of 10 frames have no mask, first 00004\.jpg"
    else:
        write.palette(path, np.full((32, 48), 9, np.uint8))
        match = r"the mask holds \[9\]"
    with pytest.raises(CaseError, match=match):
        find_cases(folder)[0].load()


def test_masks_of_another_size_and_missing_mask_folders_are_refused(tmp_path: Path, write):
    folder = write.davis(tmp_path / "echo")
    for frame in range(10):
        write.palette(folder / "Annotations" / "clip0" / f"{frame:05d}.png", np.zeros((16, 24), np.uint8))
    (folder / "Annotations" / "clip1").rename(folder / "Annotations" / "other")
    first, second = find_cases(folder)
    with pytest.raises(CaseError, match=r"masks of shape \(10, 16, 24\).*\(10, 32, 48\)"):
        first.load()
    with pytest.raises(CaseError, match="no masks for it"):
        second.load()


def test_a_wrong_field_of_meta_json_is_named(tmp_path: Path, write):
    folder = write.davis(tmp_path / "echo", meta={"modality": "US", "labels": {"organ": "one"}})
    with pytest.raises(CaseError, match=r"meta\.json: labels\.organ"):
        find_cases(folder)
