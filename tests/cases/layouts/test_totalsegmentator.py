from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medsam2.cases.case import Case, CaseError
from medsam2.cases.layouts import find_cases, load_case
from medsam2.errors import UserError


def subjects(write, folder: Path, image: str = "ct.nii.gz", count: int = 2) -> Path:
    for number in range(count):
        scan, mask = write.scan(number)
        subject = folder / f"s{number:04d}"
        write.volume(subject / image, scan)
        write.volume(subject / "segmentations" / "liver.nii.gz", (mask > 0).astype(np.uint8))
        write.volume(subject / "segmentations" / "lesion.nii.gz", (mask == 2).astype(np.uint8) * 255)
        write.volume(subject / "segmentations" / "spleen.nii.gz", np.zeros_like(mask))
    return folder


def region(case: Case, name: str) -> np.ndarray:
    label = next(label for label in case.labels if label.name == name)
    return case.planes[label.plane] == label.id


def test_every_file_is_one_structure_and_overlaps_are_kept(tmp_path: Path, write):
    case = load_case(find_cases(subjects(write, tmp_path / "ts"))[1])
    image, mask = write.scan(1)
    assert (case.dataset, case.case_id, case.patient_id, case.modality) == ("ts", "s0001", "s0001", "CT")
    assert np.array_equal(case.image, image)
    assert np.array_equal(region(case, "liver"), mask > 0)
    assert np.array_equal(region(case, "lesion"), mask == 2)


def test_mri_gives_its_modality(tmp_path: Path, write):
    assert {r.modality for r in find_cases(subjects(write, tmp_path, "mri.nii.gz"))} == {"MR"}


def test_the_splits_of_meta_csv_are_kept(tmp_path: Path, write):
    subjects(write, tmp_path / "ts", count=3)
    (tmp_path / "ts" / "meta.csv").write_text("\ufeffimage_id;age;split\ns0000;70;train\ns0001;60;test\n")
    assert [r.split for r in find_cases(tmp_path / "ts")] == ["train", "test", ""]
    (tmp_path / "ts" / "meta.csv").write_text("image_id;split\ns0000;holdout\n")
    with pytest.raises(UserError, match=r"meta\.csv line 2: split 'holdout'"):
        find_cases(tmp_path / "ts")


def test_one_subject_can_be_the_source(tmp_path: Path, write):
    (ref,) = find_cases(subjects(write, tmp_path / "ts") / "s0001")
    assert (ref.dataset, ref.case_id) == ("ts", "s0001")


def test_a_subject_that_lacks_its_half_fails_by_name(tmp_path: Path, write):
    folder = subjects(write, tmp_path / "ts", count=3)
    (folder / "s0000" / "ct.nii.gz").unlink()
    for path in (folder / "s0001" / "segmentations").iterdir():
        path.unlink()
    refs = find_cases(folder)
    with pytest.raises(CaseError, match=r"s0000/ct\.nii\.gz: no such file"):
        load_case(refs[0])
    with pytest.raises(CaseError, match=r"s0001/segmentations: holds no file"):
        load_case(refs[1])
    load_case(refs[2])


def test_104_structures_fit_into_few_planes(tmp_path: Path, write):
    scan, _ = write.scan(0)
    write.volume(tmp_path / "s1" / "ct.nii.gz", scan)
    for number in range(104):
        mask = np.zeros(scan.shape, np.uint8)
        mask[number % 12, number // 12 * 4 : number // 12 * 4 + 4, 3:9] = 1
        write.volume(tmp_path / "s1" / "segmentations" / f"part_{number:03d}.nii.gz", mask)
    case = load_case(find_cases(tmp_path)[0])
    assert len(case.labels) == 104
    assert case.planes.shape[0] == 1
    assert all(region(case, f"part_{number:03d}").sum() == 24 for number in range(104))


def test_the_real_example_split_into_structures_gives_the_same_masks(tmp_path: Path, test_data: Path):
    import SimpleITK as sitk

    source = test_data / "ct" / "totalsegmentator"
    subject = tmp_path / "ts" / "s0001"
    (subject / "segmentations").mkdir(parents=True)
    (subject / "ct.nii.gz").write_bytes((source / "example_ct.nii.gz").read_bytes())
    seg = sitk.Cast(sitk.ReadImage(str(source / "example_seg.nii.gz")), sitk.sitkUInt8)
    counts = np.bincount(sitk.GetArrayViewFromImage(seg).ravel())
    values = [int(v) for v in np.flatnonzero(counts) if v]
    for value in values:
        sitk.WriteImage(seg == value, str(subject / "segmentations" / f"structure_{value}.nii.gz"))
    case = load_case(find_cases(tmp_path)[0])
    assert {label.name for label in case.labels} == {f"structure_{value}" for value in values}
    assert all(region(case, f"structure_{value}").sum() == counts[value] for value in values)
