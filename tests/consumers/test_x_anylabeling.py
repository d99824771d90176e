"""X-AnyLabeling loads an exported encoder and decoder as a custom model, and draws around our masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotation_tools import Ours, exported, filled, marks, pictures, qt_or_skip, read
from consumer_program import folder_of, overlap, run_program

NAME = "x_anylabeling"
PROGRAM = Path(__file__).with_name("anylabeling_program.py")
pytestmark = pytest.mark.slow  # for the export


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """What the program was asked, and what it answered: all prompts on all pictures, then a grid of clicks."""
    folder_of(NAME)
    qt_or_skip()
    place = tmp_path_factory.mktemp(NAME)
    files = exported()
    (place / "home").mkdir()
    items: list[dict[str, Any]] = []
    for name, path in pictures(place).items():
        for prompt, given in (marks(128, 128) if name == "side" else marks()).items():
            items.append({"picture": str(path), "marks": given, "name": f"{name}, {prompt}"})
    items.append({**items[0], "marks": [{"type": "auto_grid"}], "name": "grid"})
    answer = run_program(
        NAME,
        PROGRAM,
        [files / "x-anylabeling.yaml"],
        {"items": np.array(json.dumps(items))},
        {"HOME": str(place / "home"), "QT_QPA_PLATFORM": "offscreen"},
    )
    return items, answer


def test_boxes_and_clicks_give_our_logits_but_for_fractions_of_a_pixel(
    asked: tuple[list[dict[str, Any]], dict[str, np.ndarray]],
) -> None:
    items, answer = asked
    ours = Ours()
    seen: list[np.ndarray] = []
    for number, item in enumerate(items[:-1]):
        expected = ours(read(Path(item["picture"])), item["marks"])
        given = answer[f"{number}.logits"]
        assert np.abs(given - expected).max() < 1e-3, item["name"]
        exact = ours(read(Path(item["picture"])), item["marks"], whole=False)
        assert overlap(given > 0, exact > 0) >= (1 if item["name"].startswith("side") else 0.97), item["name"]
        seen.append(given > 0)
    assert overlap(seen[0], seen[2]) < 0.99, "other prompts give the same mask: the comparison proves nothing"


def test_its_polygons_go_around_our_masks(
    asked: tuple[list[dict[str, Any]], dict[str, np.ndarray]],
) -> None:
    items, answer = asked
    for number, item in enumerate(items[:4]):
        shapes = json.loads(str(answer[f"{number}.shapes"]))
        assert shapes and {shape["type"] for shape in shapes} == {"polygon"}
        mask = answer[f"{number}.logits"] > 0
        assert overlap(filled(shapes, *mask.shape), mask) >= 0.99, item["name"]


def test_segment_everything_finds_the_object_by_itself(
    asked: tuple[list[dict[str, Any]], dict[str, np.ndarray]],
) -> None:
    items, answer = asked
    shapes = json.loads(str(answer[f"{len(items) - 1}.shapes"]))
    mask = answer["0.logits"] > 0
    assert max(overlap(filled([shape], *mask.shape), mask) for shape in shapes) > 0.8
