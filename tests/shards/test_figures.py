from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from medsam2.reporting.style import OTHERS
from medsam2.shards.figures import charts, draw_bars
from medsam2.shards.index import read_index
from medsam2.shards.tables import read_tables


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
