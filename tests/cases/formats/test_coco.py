from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_api

from medsam2.cases.case import CaseError, Label
from medsam2.cases.formats.coco import decode, read_masks

SHAPE = (3, 8, 10)
NAMES = ["00000.jpg", "00001.jpg", "00002.jpg"]


def plain_runs(mask: np.ndarray) -> list[int]:
    """Run lengths of [H, W] down the columns, zeros first."""
    flat = mask.T.ravel().astype(int)
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.r_[0, ends, flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def compressed(mask: np.ndarray) -> str:
    """As the COCO API writes run lengths."""
    return str(coco_api.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode())


def coco(path: Path, annotations: list[dict[str, Any]], folder: str = "clip", **more: Any) -> Path:
    images = [
        {"id": 10 + n, "file_name": f"{folder}/{name}" if folder else name, "height": SHAPE[1], "width": SHAPE[2]}
        for n, name in enumerate(NAMES)
    ]
    content = {
        "images": images,
        "categories": [{"id": 1, "name": "polyp"}, {"id": 2, "name": "tool"}],
        "annotations": annotations,
        **more,
    }
    path.write_text(json.dumps(content))
    return path


def square(x0: int, y0: int, x1: int, y1: int) -> list[list[float]]:
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_plain_and_compressed_give_the_mask(seed: int):
    mask = np.random.default_rng(seed).random((37, 53)) < (0.5, 0.02, 0.98, 0.3, 0.999)[seed]
    runs = plain_runs(mask)
    for counts in (runs, compressed(mask)):
        assert np.array_equal(decode(Path("a.json"), {"size": [37, 53], "counts": counts}, (37, 53)), mask)


def test_a_known_string_of_the_coco_api_is_decoded():
    # runs 5, 2, 2, 2, 5 of a 4 x 4 mask with the inner 2 x 2 set; the last two are written as differences 0 and 3
    mask = decode(Path("a.json"), {"size": [4, 4], "counts": "52203"}, (4, 4))
    expected = np.zeros((4, 4), bool)
    expected[1:3, 1:3] = True
    assert np.array_equal(mask, expected)


def test_a_polygon_covers_the_pixels_whose_centres_it_holds():
    mask = decode(Path("a.json"), square(2, 1, 5, 4), (8, 10))
    expected = np.zeros((8, 10), bool)
    expected[1:4, 2:5] = True
    assert np.array_equal(mask, expected)
    beyond = decode(Path("a.json"), square(-5, -5, 50, 50), (8, 10))
    assert beyond.all()
    triangle = decode(Path("a.json"), [[0, 0, 8, 0, 0, 8]], (8, 10))
    assert triangle.sum() == pytest.approx(32, abs=4)


def test_categories_without_tracks_are_one_object_each(tmp_path: Path):
    path = coco(
        tmp_path / "a.json",
        [
            {"image_id": 10, "category_id": 1, "segmentation": square(0, 0, 2, 2)},
            {"image_id": 10, "category_id": 1, "segmentation": square(4, 0, 6, 2)},
            {"image_id": 12, "category_id": 2, "segmentation": square(5, 5, 7, 7)},
        ],
    )
    mask = read_masks(path, "clip", NAMES, SHAPE)
    assert mask.labels == (Label(1, "polyp"), Label(2, "tool"))
    expected = np.zeros(SHAPE, np.uint8)
    expected[0, 0:2, [0, 1, 4, 5]] = 1
    expected[2, 5:7, 5:7] = 2
    assert np.array_equal(mask.planes[0], expected)


@pytest.mark.parametrize("key", ["track_id", "instance_id", "attributes"])
def test_tracks_are_objects_and_overlaps_get_a_plane_of_their_own(tmp_path: Path, key: str):
    def entry(image: int, track: int, box: list[list[float]]) -> dict[str, Any]:
        track_fields = {"attributes": {"track_id": track}} if key == "attributes" else {key: track}
        return {"image_id": image, "category_id": 1, "segmentation": box, **track_fields}

    path = coco(
        tmp_path / "a.json",
        [entry(10, 7, square(0, 0, 4, 4)), entry(11, 7, square(1, 0, 5, 4)), entry(11, 8, square(2, 2, 6, 6))],
    )
    mask = read_masks(path, "clip", NAMES, SHAPE)
    assert mask.labels == (Label(1, "polyp"), Label(1, "polyp", 1))
    assert mask.planes.shape == (2, *SHAPE)
    assert mask.planes[0].sum() == 32
    assert mask.planes[1, 1, 2:6, 2:6].all()


def test_youtube_vis_is_refused_and_a_clip_must_be_named_as_in_the_file(tmp_path: Path):
    path = coco(tmp_path / "a.json", [], videos=[{"id": 1, "file_names": NAMES}])
    with pytest.raises(CaseError, match=r"a\.json: YouTube-VIS is not read"):
        read_masks(path, "clip", NAMES, SHAPE)
    path = coco(tmp_path / "b.json", [], videos=[{"id": 1, "name": "other"}])
    with pytest.raises(CaseError, match=r"b\.json: no video 'clip' in it \(it has other\)"):
        read_masks(path, "clip", NAMES, SHAPE)


def test_the_frames_of_a_video_file_come_in_their_order(tmp_path: Path):
    images = [
        {"id": n, "file_name": f"{9 - n}.jpg", "frame_id": n, "video_id": 1, "height": 8, "width": 10} for n in range(3)
    ]
    annotations = [{"image_id": 2, "category_id": 1, "segmentation": square(0, 0, 2, 2)}]
    path = coco(tmp_path / "a.json", annotations, images=images, videos=[{"id": 1, "name": "clip.mp4"}])
    assert read_masks(path, "clip", (), SHAPE).planes[0].any(axis=(1, 2)).tolist() == [False, False, True]
    with pytest.raises(CaseError, match="lists 3 frames for a video of 4"):
        read_masks(path, "clip", (), (4, 8, 10))


@pytest.mark.parametrize("folder", ["../clip", "/clip", "C:\\clip", "a/../../clip"])
def test_file_names_that_leave_the_folder_are_refused(tmp_path: Path, folder: str):
    with pytest.raises(CaseError, match=r"a\.json: file name .* leaves the folder"):
        read_masks(coco(tmp_path / "a.json", [], folder), "clip", NAMES, SHAPE)


@pytest.mark.parametrize(
    ("segmentation", "match"),
    [
        ({"size": [8, 10], "counts": [1, 2]}, "add up to 3"),
        ({"size": [8, 10], "counts": [-5, 85]}, "add up to"),
        ({"size": [9, 10], "counts": [90]}, "of size"),
        ({"size": [8, 10], "counts": "\x7f"}, "not text of the COCO API"),
        ({"size": [8, 10], "counts": "o"}, "not text of the COCO API"),
        ({"size": [8, 10], "counts": "52"}, "add up to less"),
        ({"size": [8, 10], "counts": "0kd0"}, "add up to more"),
        ([[1, 2, 3, 1e300, 5, 6]], "three or more"),
        ([[1, 2, 3]], "three or more"),
        ([[1, 2, 3, 4, float("nan"), 6]], "three or more"),
        ({"counts": [80]}, "no key 'size'"),
    ],
)
def test_a_segmentation_that_does_not_fit_is_refused(tmp_path: Path, segmentation: Any, match: str):
    path = coco(tmp_path / "a.json", [{"image_id": 10, "category_id": 1, "segmentation": segmentation}])
    with pytest.raises(CaseError, match=rf"a\.json: .*{match}"):
        read_masks(path, "clip", NAMES, SHAPE)


def test_frames_that_are_not_listed_and_other_sizes_are_refused(tmp_path: Path):
    path = coco(tmp_path / "a.json", [])
    with pytest.raises(CaseError, match=r"1 of 4 frames are not listed, first 00009"):
        read_masks(path, "clip", [*NAMES, "00009.jpg"], (4, 8, 10))
    with pytest.raises(CaseError, match=r"states height and width \(8, 10\), but the frames are \(8, 11\)"):
        read_masks(path, "clip", NAMES, (3, 8, 11))


@pytest.mark.parametrize("text", ["", "[1, 2", "[]", '{"images": []}', '{"categories": [], "annotations": 3}', "null"])
def test_what_is_not_coco_is_refused_and_named(tmp_path: Path, text: str):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CaseError, match=r"a\.json"):
        read_masks(tmp_path / "a.json", "clip", NAMES, SHAPE)
