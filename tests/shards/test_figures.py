from __future__ import annotations

import base64
import io
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from medsam2.shards import figures
from medsam2.shards.figures import OTHERS, OTHERS_COLOUR, Distribution, charts, draw, merge, palette
from medsam2.shards.index import read_index
from medsam2.shards.tables import read_tables


def test_shards_give_one_figure_for_each_distribution_that_they_have(shards: Path):
    tables = read_tables(read_index(shards))
    found = charts(tables, {0: np.arange(32), 3: np.arange(32)}, "of 2 segments")
    titles = [chart.title for chart in found]
    assert titles == [
        "Intensities", "Pixel size", "Slice spacing", "Frame size", "Volumes", "Clips", "Object area",
        "Frames with an object",
    ]  # fmt: skip
    assert found[0].note == "of 2 segments"
    assert "2 clips and stills of unknown pixel size" in found[1].note  # the two of the scope
    for chart in found:
        root = ElementTree.parse(io.BytesIO(base64.b64decode(chart.data))).getroot()
        assert root.tag.endswith("svg")


def test_without_histograms_there_is_no_figure_of_intensities(shards: Path):
    assert "Intensities" not in [chart.title for chart in charts(read_tables(read_index(shards)), {})]


def test_at_most_seven_series_have_a_colour_and_the_rest_is_joined():
    sizes = {f"set{number}": 100 - number for number in range(10)}
    colours = palette(sizes)
    assert len(set(colours.values())) == len(colours) == 8
    assert "set6" in colours and "set7" not in colours
    merged = merge({name: np.full(2, number) for number, name in enumerate(sizes)}, colours)
    assert list(merged) == [*(f"set{number}" for number in range(7)), OTHERS]
    assert merged[OTHERS].tolist() == [7, 7, 8, 8, 9, 9]
    assert colours[OTHERS] == OTHERS_COLOUR


@pytest.mark.parametrize(
    "values", [np.array([5]), np.array([1, 1_000_000]), np.array([0.7, 0.7]), np.array([np.nan, 0.0]), np.arange(1, 9)]
)
@pytest.mark.parametrize("whole", [False, True])
def test_any_values_can_be_drawn(values: np.ndarray, whole: bool):
    distribution = Distribution("Title", "label, mm", "cases", {"CT": values}, whole=whole)
    assert draw(distribution, distribution.values, {"CT": "#000000"})


def test_bars_of_very_many_values_keep_their_height(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figures, "LIMIT", 100)
    values = np.tile([1, 2], 5000)
    assert figures._count(values, np.array([0.5, 3.0])).tolist() == [10000]
