from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsam2.cases.case import CaseError
from medsam2.cases.layouts import find_cases, load_case
from medsam2.cases.settings import DatasetSettings, SettingsBook
from medsam2.errors import UserError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 255, (24, 30, 3), dtype=np.uint8)
WHITE = np.zeros((24, 30), np.uint8)
WHITE[4:12, 6:20] = 255


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def two_folders(
    folder: Path, images: str = "images", masks: str = "masks", suffix: str = "", mask: np.ndarray = WHITE
) -> Path:
    for name in "ab":
        save(folder / images / f"{name}.png", COLOUR)
        save(folder / masks / f"{name}{suffix}.png", mask)
    return folder


@pytest.mark.parametrize(
    ("images", "masks", "suffix"),
    [
        ("images", "masks", ""), ("images", "masks", "_mask"), ("img", "label", "_seg"), ("imgs", "labels", "-label"),
        ("image", "mask", "_segmentation"), ("JPEGImages", "SegmentationClass", ""), ("Images", "Masks", ""),
    ],
)  # fmt: skip
def test_images_meet_their_masks_by_name(tmp_path: Path, images: str, masks: str, suffix: str):
    refs = find_cases(two_folders(tmp_path / "set", images, masks, suffix), modality="ENDOSCOPY")
    assert [(r.dataset, r.case_id, r.patient_id, r.layout) for r in refs] == [
        ("set", name, name, "image_masks") for name in "ab"
    ]
    case = load_case(refs[0])
    assert np.array_equal(case.image, COLOUR[None])
    assert np.array_equal(case.planes[0, 0], WHITE)
    assert [(label.id, label.name) for label in case.labels] == [(255, "object")]
    assert (case.kind, case.spacing) == ("still", (1.0, 1.0, 1.0))


@pytest.mark.parametrize("value", [1, 255])
def test_meta_json_names_the_label_and_the_modality(tmp_path: Path, value: int):
    folder = two_folders(tmp_path / "set")
    meta = {"modality": "us", "labels": {"lesion": value}, "spacing_mm": 3.0, "patients": {"a": "p", "b": "p"}}
    (folder / "meta.json").write_text(json.dumps(meta))
    refs = find_cases(folder)
    assert {ref.patient_id for ref in refs} == {"p"}
    case = load_case(refs[0])
    assert [label.name for label in case.labels] == ["lesion"]
    assert (case.modality, case.spacing) == ("US", (1.0, 3.0, 3.0))
    assert np.array_equal(case.image, COLOUR[None])  # coarse pixels do not turn a still


def test_the_modality_is_asked_for_where_nobody_names_it(tmp_path: Path):
    with pytest.raises(CaseError, match="give --modality"):
        load_case(find_cases(two_folders(tmp_path / "set"))[0])


@pytest.mark.parametrize("order", ["train/images", "images/train"])
def test_folders_of_splits_are_kept_as_splits(tmp_path: Path, order: str):
    for split in ("train", "val", "test"):
        for part in ("images", "masks"):
            place = tmp_path / "set" / order.replace("train", split).replace("images", part)
            save(place / f"{split}.png", COLOUR if part == "images" else WHITE)
            save(place / "same.png", COLOUR if part == "images" else WHITE)
    refs = find_cases(tmp_path / "set", modality="OTHER")
    assert {(r.case_id, r.split) for r in refs} == {(s, s) for s in ("train", "val", "test")} | {
        (f"{s}_same", s) for s in ("train", "val", "test")
    }
    assert {r.dataset for r in refs} == {"set"}


def test_a_folder_of_masks_holds_one_object_a_file(tmp_path: Path):
    folder = tmp_path / "set"
    save(folder / "images" / "a.png", COLOUR)
    other = np.zeros_like(WHITE)
    other[8:20, 10:25] = 1
    save(folder / "masks" / "a" / "liver.png", WHITE)
    save(folder / "masks" / "a" / "kidney.png", other)
    case = load_case(find_cases(folder, modality="OTHER")[0])
    assert sorted(label.name for label in case.labels) == ["kidney", "liver"]
    for label in case.labels:
        expected = WHITE > 0 if label.name == "liver" else other > 0
        assert np.array_equal(case.planes[label.plane, 0] == label.id, expected)


def test_several_masks_of_an_image_are_objects(tmp_path: Path):
    save(tmp_path / "set" / "benign (1).png", COLOUR)
    save(tmp_path / "set" / "benign (1)_mask.png", WHITE)
    save(tmp_path / "set" / "benign (1)_mask_1.png", WHITE[::-1].copy())
    case = load_case(find_cases(tmp_path / "set", modality="US")[0])
    assert [label.name for label in case.labels] == ["object", "object"]


@pytest.mark.parametrize(
    ("image", "mask"), [("a.png", "a_mask.png"), ("img7.png", "mask7.png"), ("x_img.png", "x_seg.png")]
)
def test_pairs_in_one_folder_are_found(tmp_path: Path, image: str, mask: str):
    save(tmp_path / "set" / image, COLOUR)
    save(tmp_path / "set" / mask, WHITE)
    (tmp_path / "set" / "notes.txt").write_text("x")
    refs = find_cases(tmp_path / "set", modality="OTHER")
    assert [(r.images[0].name, r.masks[0].name) for r in refs] == [(image, mask)]
    assert load_case(refs[0]).planes.any()


def test_a_folder_with_a_mask_of_no_image_is_not_claimed(tmp_path: Path):
    save(tmp_path / "set" / "a.png", COLOUR)
    save(tmp_path / "set" / "a_mask.png", WHITE)
    save(tmp_path / "set" / "liver_seg.png", WHITE)
    with pytest.raises(UserError, match="no case found"):
        find_cases(tmp_path / "set")


def test_what_lacks_its_other_half_fails_when_read(tmp_path: Path):
    folder = two_folders(tmp_path / "set")
    (folder / "masks" / "a.png").unlink()
    (folder / "images" / "b.png").unlink()
    save(folder / "images" / "c.png", COLOUR)
    save(folder / "masks" / "c.png", WHITE)
    first, second, third = find_cases(folder, modality="OTHER")
    with pytest.raises(CaseError, match=r"a\.png: the mask .* is missing"):
        load_case(first)
    with pytest.raises(CaseError, match=r"masks/b\.png: the image .* is missing"):
        load_case(second)
    assert load_case(third).planes.any()


def test_a_mask_of_another_size_is_refused(tmp_path: Path):
    with pytest.raises(CaseError, match=r"a\.png: mask of shape \(1, 5, 6\)"):
        load_case(find_cases(two_folders(tmp_path / "s", mask=np.zeros((5, 6), np.uint8)), modality="OTHER")[0])


def test_jpeg_masks_need_a_threshold_and_are_exact_with_it(tmp_path: Path):
    save(tmp_path / "set" / "images" / "a.png", COLOUR)
    (tmp_path / "set" / "masks").mkdir()
    Image.fromarray(WHITE).save(tmp_path / "set" / "masks" / "a.jpg", quality=70)
    ref = find_cases(tmp_path / "set", modality="OTHER")[0]
    with pytest.raises(CaseError, match=r"a\.jpg: the mask holds values altered by a lossy format.*127"):
        load_case(ref)
    case = load_case(replace(ref, settings=DatasetSettings(threshold=127)))
    assert np.array_equal(case.planes[0, 0] == case.labels[0].id, WHITE > 0)
    assert [label.name for label in case.labels] == ["object"]


def test_labels_above_255_are_kept(tmp_path: Path):
    mask = np.zeros((24, 30), np.uint16)
    mask[2:5, 3:9] = 1000
    case = load_case(find_cases(two_folders(tmp_path / "set", mask=mask), modality="MICROSCOPY")[0])
    assert [(label.id, label.name) for label in case.labels] == [(1000, "label_1000")]


def test_volumes_and_folders_of_frames_are_cases_too(tmp_path: Path, write):
    image, mask = write.scan(1)
    write.volume(tmp_path / "ct" / "images" / "a.nii.gz", image)
    write.volume(tmp_path / "ct" / "labels" / "a.nii.gz", mask)
    case = load_case(find_cases(tmp_path / "ct", modality="CT")[0])
    assert (case.kind, case.image.shape) == ("volume", image.shape)
    assert [label.name for label in case.labels] == ["label_1", "label_2"]
    frames, masks = write.clip(0)
    for number in range(len(frames)):
        save(tmp_path / "us" / "images" / "clip" / f"{number}.png", frames[number])
        save(tmp_path / "us" / "masks" / "clip" / f"{number}.png", masks[number] * 255)
    case = load_case(find_cases(tmp_path / "us", modality="US")[0])
    assert case.kind == "clip"
    assert np.array_equal(case.planes[0] > 0, masks > 0)


def test_other_layouts_are_left_alone(tmp_path: Path, write):
    write.everything(tmp_path / "all")
    assert "image_masks" not in {ref.layout for ref in find_cases(tmp_path / "all")}
    davis = write.davis(tmp_path / "davis")
    (davis / "SegmentationClass").mkdir()
    assert {ref.layout for ref in find_cases(davis)} == {"davis_frames"}


def test_borders_of_pascal_voc_are_background(tmp_path: Path, write):
    mask = np.zeros((24, 30), np.uint8)
    mask[3:9, 3:9], mask[9, 3:9] = 2, 255
    save(tmp_path / "voc" / "JPEGImages" / "a.png", COLOUR)
    write.palette(tmp_path / "voc" / "SegmentationClass" / "a.png", mask)
    case = load_case(find_cases(tmp_path / "voc", modality="OTHER")[0])
    assert [label.id for label in case.labels] == [2]


def test_real_stills_stacks_and_volumes_are_read(test_data: Path):
    nuclei, stack = find_cases(test_data / "microscopy" / "stardist", modality="MICROSCOPY")
    assert len(load_case(nuclei).labels) == 125
    assert load_case(stack).image.shape == (31, 61, 57)
    polyps = find_cases(
        test_data / "endoscopy" / "kvasir",
        modality="ENDOSCOPY",
        book=SettingsBook(common=DatasetSettings(threshold=127)),
    )
    assert len(polyps) == 3
    for ref in polyps:
        case = load_case(ref)
        assert case.image.shape[-1] == 3
        assert case.planes.max() == 1
        with Image.open(ref.masks[0]) as picture:
            expected = np.asarray(picture.convert("L")) > 127
        assert (case.planes[0, 0] != expected).mean() < 1e-3
    assert load_case(find_cases(test_data / "ultrasound" / "busi", modality="US")[0]).planes.any()
    brain = [ref for ref in find_cases(test_data / "mri" / "pyradiomics", modality="MR") if "brain" in ref.case_id]
    assert load_case(brain[0]).spacing == pytest.approx((6.5, 0.78125, 0.78125), abs=1e-3)


def test_real_masks_of_bids_names_are_told_apart(test_data: Path):
    case = load_case(find_cases(test_data / "mri" / "tptbox", modality="MR")[0])
    names = {label.name.split("_")[0] for label in case.labels}
    assert names == {"vert", "subreg"}
