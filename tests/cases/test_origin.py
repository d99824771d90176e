from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medsam2.cases.case import GENERATED_SOURCE, Origin
from medsam2.cases.layouts import find_cases
from medsam2.demo.phantoms.write import write_cases


@pytest.mark.parametrize(
    ("description", "licence"),
    [
        ({"licence": "CC-BY-SA 4.0"}, "CC-BY-SA-4.0"),
        ({"license": "cc by 4.0"}, "CC-BY-4.0"),
        ({"licence": "see Dr. Smith"}, ""),
        ({"license": ["MIT"]}, "MIT"),
        ({"license": None}, ""),
        ({}, ""),
    ],
)
def test_a_known_licence_is_kept_and_free_text_is_not(description: dict[str, Any], licence: str) -> None:
    assert Origin.from_description(description) == Origin("", licence)


@pytest.mark.parametrize("key", ["source", "reference"])
def test_a_source_in_free_text_is_not_kept(key: str) -> None:
    assert Origin.from_description({key: "hospital of Dr. Smith"}) == Origin()


def test_generated_cases_state_their_own(tmp_path: Path) -> None:
    write_cases(tmp_path / "cases", cases=1, workers=1, modalities=("CT", "US"))
    refs = find_cases(tmp_path / "cases")
    assert {ref.modality for ref in refs} == {"CT", "US"}
    assert {ref.origin for ref in refs} == {Origin(GENERATED_SOURCE, "Apache-2.0")}
    assert json.loads((tmp_path / "cases" / "phantom_us" / "meta.json").read_text())["licence"] == "Apache-2.0"


def test_image_folders_state_theirs_in_their_json(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.ones((8, 8), np.uint8)).save(tmp_path / name / "a.png")
    (tmp_path / "meta.json").write_text(json.dumps({"modality": "US", "licence": "CC-BY-4.0"}))
    assert [ref.origin for ref in find_cases(tmp_path)] == [Origin("", "CC-BY-4.0")]
