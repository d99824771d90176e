from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_files import CANARIES, write_seg, write_series

from medsam2.cases.case import CaseError
from medsam2.cases.layouts import find_cases, load_case

STORED = np.random.default_rng(0).integers(0, 3000, (6, 20, 24)).astype(np.uint16)
MASK = np.zeros((6, 20, 24), bool)
MASK[1:5, 4:12, 5:20] = True


def archive(folder: Path) -> Path:
    """Two patients in nested folders; one folder holds two series; a segmentation lies in a folder of its own."""
    first = write_series(folder / "a" / "study" / "ct", STORED)
    write_seg(folder / "a" / "seg" / "s.dcm", first, {"organ": MASK})
    second = write_series(folder / "b", STORED[::-1], uid="2", PatientID="CANARYID78")
    write_series(folder / "b", STORED, uid="3", PatientID="CANARYID78")
    write_seg(folder / "b" / "seg.dcm", second, {"organ": MASK})
    return folder


def test_a_nested_archive_gives_one_case_a_series_with_its_segmentation(tmp_path: Path):
    refs = find_cases(archive(tmp_path / "archive"))
    assert [(r.layout, r.case_id, r.modality, len(r.images), len(r.masks)) for r in refs] == [
        ("dicom", "a/study/ct", "CT", 6, 1),
        ("dicom", "b-series2", "CT", 6, 1),
        ("dicom", "b-series3", "CT", 6, 0),
    ]
    assert [r.patient_id for r in refs] == ["CANARYID77", "CANARYID78", "CANARYID78"]
    case = load_case(refs[0])
    assert np.array_equal(case.orientation.undo(case.image), STORED.astype(int) - 1000)
    assert np.array_equal(case.orientation.undo(case.planes[0]), MASK)
    assert [label.name for label in case.labels] == ["organ"]
    assert case.window == (-90, 210)


def test_a_series_without_a_mask_fails_with_the_remedy_and_no_text_of_its_tags(tmp_path: Path):
    refs = find_cases(archive(tmp_path / "archive"))
    with pytest.raises(CaseError, match=r"its series of 6 files has no mask; .* manifest\.csv"):
        load_case(refs[2])
    assert not any(canary in f"{ref.case_id}{ref.problem}" for ref in refs for canary in CANARIES)


def test_a_linked_folder_is_not_followed(tmp_path: Path):
    archive(tmp_path / "archive")
    write_series(tmp_path / "elsewhere", STORED, uid="9")
    (tmp_path / "archive" / "link").symlink_to(tmp_path / "elsewhere")
    assert len(find_cases(tmp_path / "archive")) == 3


def test_a_damaged_file_is_a_case_that_fails(tmp_path: Path):
    folder = archive(tmp_path / "archive")
    (folder / "a" / "bad.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 40)
    refs = find_cases(folder)
    bad = [ref for ref in refs if "bad.dcm" in ref.problem]
    assert len(bad) == 1 and not bad[0].masks
    assert {ref.case_id for ref in refs} >= {"a/study/ct", "b-series2", "b-series3"}


def test_a_segmentation_that_names_no_series_belongs_to_the_one_in_its_frame_of_reference(tmp_path: Path):
    import pydicom

    folder = archive(tmp_path / "archive")
    dataset = pydicom.dcmread(folder / "a" / "seg" / "s.dcm")
    del dataset.ReferencedSeriesSequence
    dataset.save_as(folder / "a" / "seg" / "s.dcm")
    refs = {ref.case_id: ref for ref in find_cases(folder)}
    assert [mask.name for mask in refs["a/study/ct"].masks] == ["s.dcm"]
    assert not refs["b-series3"].masks


def test_dicom_below_four_folders_or_beside_nifti_is_left_to_others(tmp_path: Path, write):
    from medsam2.cases.layouts import dicom

    write_series(tmp_path / "deep" / "1" / "2" / "3" / "4", STORED)
    assert not dicom.recognise(tmp_path / "deep") and dicom.recognise(tmp_path / "deep" / "1")
    write.nnunet(tmp_path / "Dataset001_X")
    write_series(tmp_path / "Dataset001_X" / "raw", STORED)
    assert not dicom.recognise(tmp_path / "Dataset001_X")


def test_a_single_thin_slice_stays_one_picture(tmp_path: Path):
    slices = write_series(tmp_path / "thin", STORED[:1], spacing=(0.5, 1.5, 1.5))
    write_seg(tmp_path / "thin" / "seg.dcm", slices, {"organ": MASK[2:3]})
    (ref,) = find_cases(tmp_path / "thin")
    case = load_case(ref)
    assert case.kind == "still" and case.image.shape == (1, 20, 24)
    assert np.array_equal(case.planes[0] == 1, MASK[2:3])
