from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from medsam2.cases.case import CaseError
from medsam2.cases.layouts import find_cases, load_case
from medsam2.cases.listing import modality_of
from medsam2.cases.settings import DatasetSettings, SettingsBook
from medsam2.errors import UserError


def describe(folder: Path, **changes: object) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_case_has_image_mask_names_and_spacing(tmp_path: Path, write):
    case = load_case(find_cases(write.nnunet(tmp_path / "Dataset001"))[2])
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
    case = load_case(find_cases(folder)[0])
    mask = write.scan(0)[1]
    assert case.planes.shape[0] == 2
    assert np.array_equal(case.planes[1], (mask > 0).astype(np.uint8))
    assert {(label.name, label.plane) for label in case.labels} == {("lesion", 0), ("organ", 0), ("whole", 1)}


def test_regions_alone_leave_no_empty_plane(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001", cases=1)
    describe(folder, labels={"background": 0, "whole": [1, 2], "core": [2, 1]})
    case = load_case(find_cases(folder)[0])
    assert [(label.id, label.name, label.plane) for label in case.labels] == [(1, "whole", 0), (1, "core", 1)]


def test_a_value_that_the_data_set_does_not_name_is_refused(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001", cases=1)
    describe(folder, labels={"background": 0, "organ": 1})
    with pytest.raises(CaseError, match=r"smith_000\.nii\.gz: the mask holds \[2\]"):
        load_case(find_cases(folder)[0])


def test_an_image_without_mask_and_a_mask_without_image_fail_by_name(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001", cases=3)
    (folder / "labelsTr" / "smith_000.nii.gz").unlink()
    (folder / "imagesTr" / "smith_001_0000.nii.gz").unlink()
    refs = find_cases(folder)
    assert len(refs) == 3
    with pytest.raises(CaseError, match=r"labelsTr/smith_000\.nii\.gz: no such file"):
        load_case(refs[0])
    with pytest.raises(CaseError, match=r"imagesTr/smith_001_0000\.nii\.gz: no such file"):
        load_case(refs[1])
    load_case(refs[2])


def test_a_broken_dataset_json_is_named(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001", cases=1)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json: not readable as json"):
        find_cases(folder)


def book(**settings: object) -> SettingsBook:
    return SettingsBook(common=DatasetSettings.model_validate(settings))


def channels(write, folder: Path, count: int = 3, dtype: type = np.uint8) -> list[np.ndarray]:
    """One case `knee` with several channels; the images of the channels."""
    (folder / "imagesTr").mkdir(parents=True)
    names = {str(n): f"T{n + 1}" for n in range(count)}
    (folder / "dataset.json").write_text(json.dumps({"channel_names": names, "labels": {"background": 0, "organ": 1}}))
    images = [np.random.default_rng(n).integers(0, 200, (5, 16, 16)).astype(dtype) for n in range(count)]
    for number, image in enumerate(images):
        write.volume(folder / "imagesTr" / f"knee_{number:04d}.nii.gz", image)
    mask = np.zeros((5, 16, 16), np.uint8)
    mask[1:4, 4:9, 4:9] = 1
    write.volume(folder / "labelsTr" / "knee.nii.gz", mask)
    return images


def test_every_channel_is_a_case_of_one_patient_with_its_own_modality(tmp_path: Path, write):
    images = channels(write, tmp_path / "D")
    describe(tmp_path / "D", channel_names={"0": "CT", "1": "PET", "2": "noNorm"})
    refs = find_cases(tmp_path / "D")
    assert [(r.case_id, r.patient_id, r.modality, r.part.channel) for r in refs] == [
        ("knee_0000", "knee", "CT", 0),
        ("knee_0001", "knee", "PT", 1),
        ("knee_0002", "knee", "", 2),
    ]
    assert np.array_equal(load_case(refs[1]).image, images[1])


def test_the_first_channel_alone_is_a_case_of_the_plain_name(tmp_path: Path, write):
    images = channels(write, tmp_path / "D")
    (ref,) = find_cases(tmp_path / "D", modality="MR", book=book(channels="first"))
    assert ref.case_id == "knee"
    assert np.array_equal(load_case(ref).image, images[0])


def test_three_channels_fold_into_one_colour_case(tmp_path: Path, write):
    images = channels(write, tmp_path / "D")
    (ref,) = find_cases(tmp_path / "D", modality="MR", book=book(channels="rgb"))
    case = load_case(ref)
    assert ref.case_id == "knee"
    assert len(ref.images) == 3
    assert np.array_equal(case.image, np.stack(images, axis=-1))


@pytest.mark.parametrize(("count", "dtype", "message"), [(2, np.uint8, "not 2"), (3, np.int16, "not int16")])
def test_rgb_needs_three_channels_of_uint8(tmp_path: Path, write, count: int, dtype: type, message: str):
    channels(write, tmp_path / "D", count, dtype)
    (ref,) = find_cases(tmp_path / "D", modality="MR", book=book(channels="rgb"))
    with pytest.raises(CaseError, match=message):
        load_case(ref)


def test_a_missing_channel_fails_alone(tmp_path: Path, write):
    channels(write, tmp_path / "D")
    (tmp_path / "D" / "imagesTr" / "knee_0001.nii.gz").unlink()
    refs = find_cases(tmp_path / "D", modality="MR")
    with pytest.raises(CaseError, match=r"knee_0001\.nii\.gz: no such file"):
        load_case(refs[1])
    load_case(refs[0])
    load_case(refs[2])


def four_d(path: Path, array: np.ndarray) -> None:
    """Array [t, z, y, x] as a 4-D NIfTI."""
    import SimpleITK as sitk

    path.parent.mkdir(parents=True, exist_ok=True)
    volumes = [sitk.GetImageFromArray(volume) for volume in array]
    sitk.WriteImage(sitk.JoinSeries(volumes), str(path))


def cine(folder: Path, mask_frames: int = 6) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(0).integers(0, 900, (6, 3, 16, 20)).astype(np.int16)
    mask = np.zeros((6, 3, 16, 20), np.uint8)
    mask[:, :, 4:9, 5:11] = 1
    four_d(folder / "imagesTr" / "heart_0000.nii.gz", image)
    if mask_frames > 1:
        four_d(folder / "labelsTr" / "heart.nii.gz", mask[:mask_frames])
    else:
        import SimpleITK as sitk

        (folder / "labelsTr").mkdir()
        sitk.WriteImage(sitk.GetImageFromArray(mask[0]), str(folder / "labelsTr" / "heart.nii.gz"))
    description = {"channel_names": {"0": "cine"}, "labels": {"background": 0, "ventricle": 1}}
    (folder / "dataset.json").write_text(json.dumps(description))
    return image, mask


def test_a_series_in_time_is_a_clip_for_each_slice_of_one_patient(tmp_path: Path):
    image, mask = cine(tmp_path / "D")
    refs = find_cases(tmp_path / "D")
    assert [(r.case_id, r.patient_id, r.part.time_slice) for r in refs] == [
        (f"heart_slice00{z}", "heart", z) for z in range(3)
    ]
    case = load_case(refs[2])
    assert case.kind == "clip"
    assert np.array_equal(case.image, image[:, 2])
    assert np.array_equal(case.planes[0], mask[:, 2])
    assert [label.name for label in case.labels] == ["ventricle"]


def test_a_series_in_time_with_a_mask_of_one_moment_is_refused(tmp_path: Path):
    cine(tmp_path / "D", mask_frames=1)
    (ref,) = find_cases(tmp_path / "D")
    with pytest.raises(CaseError, match=r"heart\.nii\.gz: is not 4-D, but its image .* 3 slices in time"):
        load_case(ref)


def test_a_labelled_test_set_keeps_its_split(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "D", cases=1)
    image, mask = write.scan(9)
    write.volume(folder / "imagesTs" / "jones_0000.nii.gz", image)
    assert {r.split for r in find_cases(folder)} == {""}, "a test set without labels is left out"
    write.volume(folder / "labelsTs" / "jones.nii.gz", mask)
    assert [(r.case_id, r.split) for r in find_cases(folder)] == [("jones", "test"), ("smith_000", "")]


def test_version_1_names_labels_the_other_way_round(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "D", cases=1)
    entries = [{"image": "./imagesTr/smith_000.nii.gz", "label": "./labelsTr/smith_000.nii.gz"}]
    labels = {"0": "background", "1": "organ", "2": "lesion"}
    description = {"modality": {"0": "CT"}, "labels": labels, "training": entries}
    (folder / "dataset.json").write_text(json.dumps(description))
    (ref,) = find_cases(folder)
    assert ref.layout == "nnunet_raw"
    assert [(label.id, label.name) for label in load_case(ref).labels] == [(1, "organ"), (2, "lesion")]


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_pictures_of_three_colours_in_one_file_are_one_case(tmp_path: Path, ending: str):
    from PIL import Image

    from medsam2.cases.formats.registry import find_format

    folder = tmp_path / "D"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    image = np.random.default_rng(0).integers(0, 255, (20, 24, 3)).astype(np.uint8)
    mask = np.zeros((20, 24), np.uint8)
    mask[5:9, 6:12] = 1
    Image.fromarray(image).save(folder / "imagesTr" / f"road_0000{ending}")
    Image.fromarray(mask).save(folder / "labelsTr" / f"road{ending}")
    description = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "road": 1}}
    (folder / "dataset.json").write_text(json.dumps(description | {"file_ending": ending}))
    (ref,) = find_cases(folder, modality="OTHER")
    assert ref.case_id == "road"
    if find_format(ref.images[0]) is None:
        pytest.skip(f"no format reads {ending}")
    case = load_case(ref)
    assert case.kind == "still"
    assert np.array_equal(case.image[0], image)
    assert np.array_equal(case.planes[0, 0], mask)


def test_a_label_that_is_no_number_is_named(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "D", cases=1)
    describe(folder, labels={"background": 0, "organ": "one"})
    with pytest.raises(UserError, match=r"dataset\.json: labels: 'organ': 'one' is neither"):
        find_cases(folder)
