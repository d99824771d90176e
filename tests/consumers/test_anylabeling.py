"""AnyLabeling loads an exported encoder and decoder as a custom model; it prepares pictures in its own way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotation_tools import Ours, exported, filled, marks, pictures, qt_or_skip, read
from consumer_program import folder_of, overlap, run_program

NAME = "anylabeling"
PROGRAM = Path(__file__).with_name("anylabeling_program.py")
pytestmark = pytest.mark.slow  # for the export


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By "PICTURE, PROMPT": what the program was asked, and what it answered."""
    folder_of(NAME)
    qt_or_skip()
    place = tmp_path_factory.mktemp(NAME)
    files = exported()
    (place / "home").mkdir()
    items: dict[str, dict[str, Any]] = {}
    for name, path in pictures(place).items():
        for prompt, given in (marks(128, 128) if name == "side" else marks()).items():
            items[f"{name}, {prompt}"] = {"picture": str(path), "marks": given}
    answer = run_program(
        NAME,
        PROGRAM,
        [files / "anylabeling.yaml"],
        {"items": np.array(json.dumps(list(items.values())))},
        {"HOME": str(place / "home"), "QT_QPA_PLATFORM": "offscreen"},
    )
    return {
        name: {**item, "logits": answer[f"{number}.logits"], "shapes": json.loads(str(answer[f"{number}.shapes"]))}
        for number, (name, item) in enumerate(items.items())
    }


def test_it_gives_our_logits_of_pictures_with_swapped_colours_that_are_resized_roughly(
    asked: dict[str, dict[str, Any]],
) -> None:
    ours = Ours()
    for name, item in asked.items():
        picture = read(Path(item["picture"]))
        expected = ours(picture[..., ::-1], item["marks"], smooth=False)
        assert np.abs(item["logits"] - expected).max() < 1e-3, name
        if not name.startswith("grey"):
            assert np.abs(item["logits"] - ours(picture, item["marks"])).max() > 0.1, "it swaps no colours any more"


def test_masks_of_grey_pictures_overlap_ours_all_the_same(asked: dict[str, dict[str, Any]]) -> None:
    ours = Ours()
    for prompt in ("box", "click", "clicks", "box and click"):
        item = asked[f"grey, {prompt}"]
        expected = ours(read(Path(item["picture"])), item["marks"], whole=False)
        assert overlap(item["logits"] > 0, expected > 0) >= 0.98, prompt


def test_its_polygons_go_around_these_masks(asked: dict[str, dict[str, Any]]) -> None:
    for prompt in ("box", "click", "clicks", "box and click"):
        item = asked[f"grey, {prompt}"]
        mask = item["logits"] > 0
        assert item["shapes"] and overlap(filled(item["shapes"], *mask.shape), mask) >= 0.99, prompt
