from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsam2.errors import UserError
from medsam2.reporting.page import Picture
from medsam2.reporting.style import OBJECTS
from medsam2.shards.index import read_index
from medsam2.shards.load import load_segment
from medsam2.shards.pictures import labelled_picture, load_frame, segment_picture, spread


def opened(picture: Picture) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(picture.content)))


def test_pictures_are_spread_over_groups_of_very_different_size():
    groups = ["large"] * 1000 + ["middle"] * 10 + ["small"] * 2
    chosen = spread(groups, 24)
    assert len(chosen) == 24
    assert {name: sum(groups[i] == name for i in chosen) for name in set(groups)} == {
        "small": 2, "middle": 10, "large": 12,
    }  # fmt: skip
    assert chosen == sorted(set(chosen))
    large = [i for i in chosen if groups[i] == "large"]
    assert large[0] < 100 and large[-1] > 900


def test_more_groups_than_pictures_still_give_no_more_than_asked_for():
    assert len(spread(list(range(100)), 24)) == 24
    assert spread(["a", "b"], 24) == [0, 1]
    assert spread([], 24) == []
    assert spread(["one"] * 4, 2) == [1, 3]


def test_one_frame_is_read_as_the_whole_segment_has_it(shards: Path):
    index = read_index(shards)
    for number in range(len(index)):
        row, image, planes = load_segment(index, number)
        frame = len(row.frames) - 1
        one, masks = load_frame(index, row, frame)
        assert np.array_equal(one, image[frame])
        assert np.array_equal(masks, planes[:, frame])


def test_the_picture_of_a_segment_names_what_is_outlined_and_no_patient(shards: Path):
    index = read_index(shards)
    number = next(n for n in range(len(index)) if index.row(n).dataset == "Dataset001_Test")
    picture = segment_picture(index, number)
    assert [name for name, _ in picture.colours] == ["organ", "lesion"]
    assert index.row(number).case in picture.caption
    assert max(opened(picture).shape) == 320


def test_a_damaged_shard_is_an_error_that_names_it(shards: Path, tmp_path: Path):
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    index = read_index(folder)
    shard = folder / index.row(0).shard
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match=shard.name):
        segment_picture(index, 0)


def test_the_outline_of_a_mask_is_drawn_in_the_colour_of_its_name():
    planes = np.zeros((1, 64, 64), np.uint8)
    planes[0, 16:48, 16:48] = 1
    picture = labelled_picture(np.zeros((64, 64), np.uint8), planes, {(0, 1): "organ"}, "a case")
    assert picture.colours == (("organ", OBJECTS[0]),)
    red = opened(picture)[..., 0] > 180
    assert red[160, 81]
    assert not red[160, 160]
    assert not red[10, 10]


def test_many_structures_are_counted_beyond_the_first_six():
    planes = np.arange(64 * 64, dtype=np.uint16).reshape(1, 64, 64) // 256
    picture = labelled_picture(np.zeros((64, 64, 3), np.uint8), planes, {(0, 1): "organ"}, "a case")
    assert len(picture.colours) == 6
    assert picture.colours[1][0] == "value 2"
    assert picture.caption == "and 9 more; a case"
