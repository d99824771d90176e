"""samexporter, whose own graphs AnyLabeling and others use, runs ours with its command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotation_tools import Ours, exported, marks, pictures, read
from consumer_program import folder_of, run_program

NAME = "samexporter"
pytestmark = pytest.mark.slow  # for the export


def test_its_command_colours_our_masks(tmp_path: Path) -> None:
    folder_of(NAME)
    files = exported()
    items: dict[str, dict[str, Any]] = {}
    for name, path in pictures(tmp_path).items():
        for prompt, given in (marks(128, 128) if name == "side" else marks()).items():
            items[f"{name}, {prompt}"] = {"picture": str(path), "marks": given}
    answer = run_program(
        NAME,
        Path(__file__).with_name("samexporter_program.py"),
        [files / "medsam2_nano_128_encoder.onnx", files / "medsam2_nano_128_decoder.onnx"],
        {"items": np.array(json.dumps(list(items.values())))},
    )
    ours = Ours()
    for number, (name, item) in enumerate(items.items()):
        logits, drawn = answer[f"{number}.logits"], answer[f"{number}.drawn"].astype(int)
        expected = ours(read(Path(item["picture"])), item["marks"], smooth=False, whole=False)
        assert np.abs(logits - expected).max() < 1e-3, name
        marked = (drawn == (0, 255, 0)).all(-1) | (drawn == (0, 0, 255)).all(-1)
        assert np.array_equal(drawn[..., 0] - drawn[..., 1] > 60, (expected > 0) & ~marked), name
