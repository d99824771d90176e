from __future__ import annotations

import io
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from medsam2.errors import UserError
from medsam2.reporting.page import Picture
from medsam2.reporting.style import OBJECTS, OTHERS
from medsam2.shards.index import read_index
from medsam2.shards.inspect.page import charts, draw_bars, draw_labels, draw_segment
from medsam2.shards.inspect.tables import read_tables


def test_shards_give_one_figure_for_each_distribution_that_they_have(shards: Path):
    tables = read_tables(read_index(shards))
    pictures = charts(tables, {0: np.arange(32), 3: np.arange(32)}, "of 2 segments")
    assert [picture.alt for picture in pictures] == [
        "Intensities", "Pixel size", "Slice spacing", "Frame size", "Volumes", "Clips", "Object area",
        "Frames with an object",
    ]  # fmt: skip
    assert pictures[0].caption == "of 2 segments"
    assert "2 clips and stills of unknown pixel size" in pictures[1].caption  # the two of the scope
    for picture in pictures:
        assert ElementTree.parse(io.BytesIO(picture.content)).getroot().tag.endswith("svg")


def test_without_histograms_there_is_no_figure_of_intensities(shards: Path):
    assert "Intensities" not in [picture.alt for picture in charts(read_tables(read_index(shards)), {})]


def test_at_most_seven_series_have_a_colour_and_the_rest_is_joined(shards: Path):
    tables = read_tables(read_index(shards))
    for frame in (tables.cases, tables.segments):
        frame["modality"] = [f"M{number % 11:02}" for number in range(len(frame))]
    pictures = charts(tables, {})
    frame_sizes = next(picture for picture in pictures if picture.alt == "Frame size").content.decode()
    assert OTHERS in frame_sizes and "others" in frame_sizes


@pytest.mark.parametrize("values", [np.array([5]), np.array([1, 1_000_000]), np.array([0.7, 0.7]), np.arange(1, 9)])
def test_any_values_can_be_drawn(values: np.ndarray):
    assert draw_bars("Title", "label, mm", "cases", {"CT": values}, {"CT": "#000000"})


def opened(picture: Picture) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(picture.content)))


def test_the_picture_of_a_segment_names_what_is_outlined_and_no_patient(shards: Path):
    index = read_index(shards)
    number = next(n for n in range(len(index)) if index.row(n).dataset == "Dataset001_Test")
    picture = draw_segment(index, number)
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
        draw_segment(index, 0)


def test_the_outline_of_a_mask_is_drawn_in_the_colour_of_its_name():
    planes = np.zeros((1, 64, 64), np.uint8)
    planes[0, 16:48, 16:48] = 1
    picture = draw_labels(np.zeros((64, 64), np.uint8), planes, {(0, 1): "organ"}, "a case")
    assert picture.colours == (("organ", OBJECTS[0]),)
    red = opened(picture)[..., 0] > 180
    assert red[160, 81]
    assert not red[160, 160]
    assert not red[10, 10]


def test_many_structures_are_counted_beyond_the_first_six():
    planes = np.arange(64 * 64, dtype=np.uint16).reshape(1, 64, 64) // 256
    picture = draw_labels(np.zeros((64, 64, 3), np.uint8), planes, {(0, 1): "organ"}, "a case")
    assert len(picture.colours) == 6
    assert picture.colours[1][0] == "value 2"
    assert picture.caption == "and 9 more; a case"
