"""What a user says about a place in a file is what the predictor is told about the frames, however they are turned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsam2.errors import UserError
from medsam2.inference.scans.prompts import from_flags, onto_scan, read_prompts
from medsam2.inference.scans.scan import ScanSettings, open_scan

OBLIQUE = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)
SAGITTAL = (0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
FLIPPED = (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
CT = ScanSettings(modality="CT", window=(0.0, 100.0))


@pytest.fixture
def scan_file(tmp_path: Path, write: Any) -> Path:
    """[Z, Y, X] = (6, 20, 24)."""
    rng = np.random.default_rng(0)
    return write.volume(tmp_path / "scan.nii.gz", rng.integers(1, 50, (6, 20, 24)).astype(np.int16))


@pytest.mark.parametrize("axis", ["file", "auto", "x", "y", "z"])
@pytest.mark.parametrize("direction", [None, OBLIQUE, SAGITTAL, FLIPPED])
def test_a_click_lands_on_the_voxel_that_was_named(
    tmp_path: Path, write: Any, axis: str, direction: tuple[float, ...] | None
) -> None:
    image = np.zeros((6, 20, 24), np.int16)
    k, j, i = 4, 3, 17
    image[k, j, i] = 100
    path = write.volume(tmp_path / "scan.nrrd", image, (0.7, 0.9, 5.0), direction=direction)
    scan = open_scan(path, ScanSettings(modality="CT", window=(0.0, 100.0), axis=axis))
    # x and y are the file's first and second index but for the one that is sliced
    sliced = 2 - scan.orientation.axes[0]
    order = [index for index in range(3) if index != sliced]
    place = (i, j, k)
    prompts = from_flags(points=[f"{place[sliced]},{place[order[0]]},{place[order[1]]}"])
    (prompt,) = onto_scan(prompts, scan).prompts
    assert prompt.points is not None
    x, y = prompt.points[0]
    assert scan.frames[prompt.frame][0, int(y), int(x)] == 255
    if axis == "file":
        assert sliced == 2


@pytest.mark.parametrize("direction", [None, SAGITTAL, FLIPPED])
def test_a_box_keeps_its_pixels_when_the_slice_is_turned(
    tmp_path: Path, write: Any, direction: tuple[float, ...] | None
) -> None:
    image = np.zeros((6, 20, 24), np.int16)
    image[2, 5:9, 11:20] = 100
    scan = open_scan(write.volume(tmp_path / "s.nrrd", image, direction=direction), CT)
    (prompt,) = onto_scan(from_flags(boxes=["2,11,5,19,8"]), scan).prompts
    assert prompt.box is not None
    rows, columns = np.nonzero(scan.frames[prompt.frame][0].numpy())
    assert prompt.box == (columns.min(), rows.min(), columns.max(), rows.max())


def test_prompts_of_one_name_are_one_object_and_box_and_clicks_on_a_slice_one_prompt(scan_file: Path) -> None:
    prompts = from_flags(
        boxes=["2,3,4,10,12,left", "4,3,4,10,12,left", "2,14,4,20,12,right"],
        points=["2,5,6,left", "2,4,4,0,left", "3,15,6,1,right"],
    )
    prompted = onto_scan(prompts, open_scan(scan_file, CT))
    assert prompted.names == ("left", "right") and prompted.values == (1, 2)
    left = [prompt for prompt in prompted.prompts if prompt.object == 0]
    assert [(p.frame, p.box is not None, None if p.labels is None else p.labels.tolist()) for p in left] == [
        (2, True, [1, 0]),
        (4, True, None),
    ]
    assert [(p.frame, p.box is not None) for p in prompted.prompts if p.object == 1] == [(2, True), (3, False)]


def test_a_recist_line_becomes_the_square_box_of_its_length_inside_of_the_slice(scan_file: Path) -> None:
    (prompt,) = onto_scan(from_flags(recists=["3,10,8,16,16,lesion"]), open_scan(scan_file, CT)).prompts
    assert prompt.box == (8.0, 7.0, 18.0, 17.0), "length 10 around (13, 12)"
    (prompt,) = onto_scan(from_flags(recists=["3,0,1,0,11"]), open_scan(scan_file, CT)).prompts
    assert prompt.box == (0.0, 1.0, 5.0, 11.0), "cut at the border"


def test_each_label_of_a_mask_is_an_object_with_its_value_on_the_slices_that_show_it(
    tmp_path: Path, write: Any, scan_file: Path
) -> None:
    labels = np.zeros((6, 20, 24), np.uint8)
    labels[1, 2:8, 2:9] = 5
    labels[1:3, 10:14, 12:20] = 2
    mask = write.volume(tmp_path / "mask.nii.gz", labels)
    prompted = onto_scan(from_flags(masks=[mask], points=["4,3,3,spare"]), open_scan(scan_file, CT))
    assert prompted.names == ("label_2", "label_5", "spare") and prompted.values == (2, 5, 1)
    scan = open_scan(scan_file, CT)
    shown: dict[str, set[int]] = {}
    for prompt in prompted.prompts[:-1]:
        name = prompted.names[prompt.object]
        shown.setdefault(name, set()).add(prompt.frame)
        assert prompt.mask is not None
        expected = scan.orientation.apply(labels)[prompt.frame] == prompted.values[prompt.object]
        np.testing.assert_array_equal(prompt.mask, expected)
    assert shown == {"label_2": {1, 2}, "label_5": {1}}


def test_masks_of_one_structure_a_file_are_told_apart_by_their_names(
    tmp_path: Path, write: Any, scan_file: Path
) -> None:
    files = []
    for number, name in enumerate(("liver", "spleen")):
        labels = np.zeros((6, 20, 24), np.uint8)
        labels[2, 2:8, 2 + 10 * number : 9 + 10 * number] = 1
        files.append(write.volume(tmp_path / f"{name}.nii.gz", labels))
    prompted = onto_scan(from_flags(masks=files, points=["3,4,5,0,liver"]), open_scan(scan_file, CT))
    assert prompted.names == ("liver", "spleen") and prompted.values == (1, 2)
    assert [(p.object, p.frame, p.mask is not None) for p in prompted.prompts] == [
        (0, 2, True),
        (0, 3, False),
        (1, 2, True),
    ]


def test_masks_of_one_name_stay_as_many_objects_as_there_are_files(tmp_path: Path, write: Any, scan_file: Path) -> None:
    files = []
    for number in range(3):
        labels = np.zeros((6, 20, 24), np.uint8)
        labels[number, 2:8, 2:9] = 1
        files.append(write.volume(tmp_path / str(number) / "seg.nii.gz", labels))
    prompted = onto_scan(from_flags(masks=files), open_scan(scan_file, CT))
    assert len(set(prompted.names)) == 3 and [prompt.frame for prompt in prompted.prompts] == [0, 1, 2]


def test_a_json_gives_objects_rounds_of_correction_and_masks_beside_it(
    tmp_path: Path, write: Any, scan_file: Path
) -> None:
    labels = np.zeros((6, 20, 24), np.uint8)
    labels[1:4, 2:8, 2:9] = 3
    write.volume(tmp_path / "mask.nii.gz", labels)
    content = {
        "objects": [
            {
                "name": "organ",
                "value": 9,
                "prompts": [
                    {"frame": 2, "box": [1, 2, 9, 10]},
                    {"frame": 2, "points": [[4, 5, 1], [9, 9, 0]]},
                    {"frame": 5, "recist": [4, 4, 4, 8]},
                ],
            },
            {"name": "known", "prompts": [{"mask": "mask.nii.gz", "value": 3, "frame": 3}]},
        ],
        "inputs": {"other.nii.gz": {"objects": [{"name": "x", "prompts": [{"frame": 90, "box": [0, 0, 1, 1]}]}]}},
    }
    (tmp_path / "prompts.json").write_text(json.dumps(content))
    prompted = onto_scan(from_flags(file=tmp_path / "prompts.json"), open_scan(scan_file, CT))
    assert prompted.names == ("organ", "known") and prompted.values == (9, 1)
    kinds = [(p.object, p.frame, p.box is not None, p.points is not None, p.mask is not None) for p in prompted.prompts]
    assert kinds == [
        (0, 2, True, False, False),
        (0, 2, False, True, False),
        (0, 5, True, False, False),
        (1, 3, False, False, True),
    ]


def test_an_input_that_the_json_does_not_name_is_said_so(tmp_path: Path, scan_file: Path) -> None:
    content = {"inputs": {"scan.nii": {"objects": [{"name": "x", "prompts": [{"frame": 0, "box": [0, 0, 1, 1]}]}]}}}
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"not 'scan\.nii\.gz'\. Did you mean 'scan\.nii'"):
        onto_scan(from_flags(file=tmp_path / "p.json"), open_scan(scan_file, CT))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"boxes": ["6,1,1,5,5"]}, "slice 6 is outside of .*scan.nii.gz, which has slices 0 to 5; slices run along"),
        ({"points": ["-1,1,1"]}, "slice -1 is outside"),
        ({"points": ["2,24,1"]}, r"\(24, 1\) is outside .* x 0 to 23 and y 0 to 19"),
        ({"boxes": ["2,1,1,5,20"]}, r"\(5, 20\) is outside"),
        ({"recists": ["2,1,1,5,20"]}, r"\(5, 20\) is outside"),
    ],
)
def test_a_place_outside_of_the_scan_is_named_with_its_limits(scan_file: Path, flags: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        onto_scan(from_flags(**flags), open_scan(scan_file, CT))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "no prompt: give --box"),
        ({"boxes": ["2,1,1,5"]}, "--box 2,1,1,5: expected Z,X0,Y0,X1,Y1"),
        ({"boxes": ["2,1,one,5,5"]}, "expected Z,X0"),
        ({"boxes": ["2,1,nan,5,5"]}, "expected Z,X0"),
        ({"boxes": ["2.5,1,1,5,5"]}, "slice 2.5 is not a whole number"),
        ({"boxes": ["2,9,1,5,5"]}, "x0 <= x1"),
        ({"boxes": ["2,1,1,5,5", "2,8,8,9,9"]}, "already has a box or line on slice 2"),
        ({"points": ["2,1,1,3"]}, "label 3 is neither 1"),
        ({"points": ["2,1"]}, "expected Z,X,Y"),
    ],
)
def test_a_prompt_that_is_none_is_refused_before_any_file_is_read(flags: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_flags(**flags)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as json"),
        ('{"object": []}', "unknown key 'object'. Did you mean 'objects'"),
        ('{"objects": [{"name": "a", "prompts": []}]}', r"objects\.0\.prompts="),
        ('{"objects": [{"name": "a", "prompts": [{"frame": 1}]}]}', r"objects\.0\.prompts\.0.*give one of these"),
        (
            '{"objects": [{"name": "a", "prompts": [{"box": [0, 0, 1, 1]}]}]}',
            r"'objects\.0\.prompts\.0\..*frame' must be given",
        ),
        ('{"objects": [{"name": "a", "prompts": [{"frame": 1, "points": [[1, 2, 3]]}]}]}', "label 3 is neither 1"),
    ],
)
def test_a_json_that_says_nothing_sensible_is_refused_with_the_place(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / "p.json")


def test_two_objects_that_ask_for_one_value_are_refused(tmp_path: Path, scan_file: Path) -> None:
    one = {"value": 4, "prompts": [{"frame": 1, "box": [0, 0, 3, 3]}]}
    (tmp_path / "p.json").write_text(json.dumps({"objects": [{"name": "a", **one}, {"name": "b", **one}]}))
    with pytest.raises(UserError, match="'a' and 'b' both have the value 4"):
        onto_scan(read_prompts(tmp_path / "p.json"), open_scan(scan_file, CT))


def test_a_mask_of_another_shape_or_without_a_voxel_is_refused(tmp_path: Path, write: Any, scan_file: Path) -> None:
    scan = open_scan(scan_file, CT)
    empty = write.volume(tmp_path / "empty.nii.gz", np.zeros((6, 20, 24), np.uint8))
    with pytest.raises(UserError, match="empty.nii.gz: no labelled voxel"):
        onto_scan(from_flags(masks=[empty]), scan)
    far = write.volume(tmp_path / "far.nii.gz", np.ones((6, 20, 24), np.uint8), origin=(900.0, 0.0, 0.0))
    with pytest.raises(UserError, match="does not overlap"):
        onto_scan(from_flags(masks=[far]), scan)
    with pytest.raises(UserError, match="no such mask"):
        onto_scan(from_flags(masks=[tmp_path / "absent.nii"]), scan)


def test_scans_whose_intensities_nobody_can_scale_are_refused_and_presets_mean_ct(scan_file: Path) -> None:
    with pytest.raises(UserError, match="modality is not known, .* int16"):
        open_scan(scan_file)
    preset, named = (open_scan(scan_file, ScanSettings(window="lung", modality=modality)) for modality in ("", "CT"))
    np.testing.assert_array_equal(preset.frames, named.frames)
    bright = open_scan(scan_file, ScanSettings(window=(0.0, 50.0))).frames
    np.testing.assert_array_equal(bright, open_scan(scan_file, CT.model_copy(update={"window": (0.0, 50.0)})).frames)


def test_a_scan_that_training_would_slice_otherwise_comes_with_a_note(tmp_path: Path, write: Any) -> None:
    image = np.random.default_rng(0).integers(0, 99, (20, 20, 8)).astype(np.uint8)
    path = write.volume(tmp_path / "sagittal.nii.gz", image, (5.0, 0.7, 0.7))
    scan = open_scan(path)
    assert len(scan.frames) == 20 and "--axis auto" in scan.notes[0] and "first index (5 mm)" in scan.notes[0]
    turned = open_scan(path, ScanSettings(axis="auto"))
    assert len(turned.frames) == 8 and not turned.notes
