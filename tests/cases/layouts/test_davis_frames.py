from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsam2.cases.case import CaseError
from medsam2.cases.layouts import find_cases, load_case


def test_a_clip_has_frames_masks_names_and_time(tmp_path: Path, write):
    case = load_case(find_cases(write.davis(tmp_path / "echo"))[1])
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
        load_case(find_cases(folder)[0])
    case = load_case(find_cases(folder, modality="US")[0])
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
    assert load_case(find_cases(folder)[0]).planes.max() == 1


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
        load_case(find_cases(folder)[0])


def test_masks_of_another_size_and_missing_mask_folders_are_refused(tmp_path: Path, write):
    folder = write.davis(tmp_path / "echo")
    for frame in range(10):
        write.palette(folder / "Annotations" / "clip0" / f"{frame:05d}.png", np.zeros((16, 24), np.uint8))
    (folder / "Annotations" / "clip1").rename(folder / "Annotations" / "other")
    first, second = find_cases(folder)
    with pytest.raises(CaseError, match=r"masks of shape \(10, 16, 24\).*\(10, 32, 48\)"):
        load_case(first)
    with pytest.raises(CaseError, match="the masks are missing"):
        load_case(second)


def test_a_wrong_field_of_meta_json_is_named(tmp_path: Path, write):
    folder = write.davis(tmp_path / "echo", meta={"modality": "US", "labels": {"organ": "one"}})
    with pytest.raises(CaseError, match=r"meta\.json: labels\.organ"):
        find_cases(folder)


def test_white_in_grey_pictures_is_the_object(tmp_path: Path, write):
    folder = write.davis(tmp_path / "echo", clips=1)
    _, mask = write.clip(0)
    for number, frame in enumerate(mask):
        Image.fromarray(frame * 255).save(folder / "Annotations" / "clip0" / f"{number:05d}.png")
    case = load_case(find_cases(folder)[0])
    assert [(label.id, label.name) for label in case.labels] == [(255, "organ")]
    assert np.array_equal(case.planes[0] > 0, mask > 0)


def test_a_folder_for_each_object_holds_binary_masks(tmp_path: Path, write):
    folder = write.davis(tmp_path / "echo", clips=1)
    place = folder / "Annotations" / "clip0"
    for path in place.iterdir():
        path.unlink()
    _, mask = write.clip(0)
    for name in ("1", "2", "tool"):
        (place / name).mkdir()
        for number, frame in enumerate(mask):
            Image.fromarray(np.roll(frame, int(name == "2"), axis=1) * 255).save(place / name / f"{number:05d}.png")
    case = load_case(find_cases(folder)[0])
    assert [label.name for label in case.labels] == ["organ", "object_2", "tool"]
    assert len({label.plane for label in case.labels}) == 3
    second = case.labels[1]
    assert np.array_equal(case.planes[second.plane] == second.id, np.roll(mask, 1, axis=2) > 0)
    (place / "2" / "00003.png").unlink()
    with pytest.raises(CaseError, match=r"2: 1 of 10 frames have no mask, first 00003\.jpg"):
        load_case(find_cases(folder)[0])


def endovis(folder: Path, write, colours: dict[int, tuple[int, int, int]]) -> Path:
    folder = write.davis(folder, clips=1, meta={"modality": "ENDOSCOPY"})
    _, mask = write.clip(0)
    table = np.zeros((256, 3), np.uint8)
    for value, colour in colours.items():
        table[value] = colour
    for number, frame in enumerate(mask):
        Image.fromarray(table[frame]).save(folder / "Annotations" / "clip0" / f"{number:05d}.png")
    entries = [
        {"name": "tissue", "color": [0, 0, 0], "classid": 0},
        {"name": "shaft", "color": [0, 255, 0], "classid": 1},
        {"name": "clasper", "color": [0, 255, 255], "classid": 2},
    ]
    (folder / "labels.json").write_text(json.dumps(entries))
    return folder


def test_colours_of_endovis_are_labels(tmp_path: Path, write):
    case = load_case(find_cases(endovis(tmp_path / "scope", write, {1: (0, 255, 0)}))[0])
    assert np.array_equal(case.planes[0], write.clip(0)[1])
    assert [(label.id, label.name) for label in case.labels] == [(1, "shaft"), (2, "clasper")]


def test_unknown_colours_and_colours_without_a_table_are_refused(tmp_path: Path, write):
    folder = endovis(tmp_path / "scope", write, {1: (0, 254, 0)})
    with pytest.raises(CaseError, match=r"00000\.png: 180 pixels have colours.*\[0, 254, 0\]"):
        load_case(find_cases(folder)[0])
    (folder / "labels.json").write_text('[{"name": "x"}]')
    with pytest.raises(CaseError, match=r"labels\.json: expected a list"):
        find_cases(folder)
    (folder / "labels.json").unlink()
    with pytest.raises(CaseError, match="found mode RGB with colours"):
        load_case(find_cases(folder)[0])


def test_pascal_voc_is_not_taken_for_clips(tmp_path: Path):
    for part, name in (("JPEGImages", "a.jpg"), ("SegmentationClass", "a.png"), ("Annotations", "a.xml")):
        (tmp_path / "voc" / part).mkdir(parents=True)
        if name.endswith("xml"):
            (tmp_path / "voc" / part / name).write_text("<annotation/>")
        else:
            Image.new("L", (8, 8), 1).save(tmp_path / "voc" / part / name)
    assert [ref.layout for ref in find_cases(tmp_path / "voc")] == ["image_masks"]
