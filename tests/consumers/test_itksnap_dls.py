"""ITK-SNAP's server takes an exported Hugging Face folder for its SAM 2, and answers clicks with our masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from consumer_program import folder_of, overlap, run_program

from medsam2.export.run import export_model
from medsam2.export.verify.clip import generated_clip
from medsam2.inference.predictor import FramePrompt, Predictor
from medsam2.model.build import load_model
from medsam2.model.tracker import Decoded, Tracker

NAME = "itksnap_dls"
PROGRAM = Path(__file__).with_name("itksnap_dls_program.py")
REPOSITORY = "facebook/sam2.1-hiera-large"  # of its class SAM2Wrapper; a folder of this name comes before the hub
CLICKS = [[114, 78, 1], [48, 54, 0], [122, 80, 1]]  # on the dark blob, on the bright one, on the dark one again
pytestmark = pytest.mark.slow  # for the start of the server


def slices() -> dict[str, np.ndarray]:
    """uint8 slices whose sides differ, grey [H, W] and colour [H, W, 3]."""
    grey = generated_clip(length=3).frames[1, 0, 10:-10].numpy()
    return {"grey": grey, "colour": np.stack([grey, grey // 2 + 60, 200 - grey // 2], -1)}


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What the server said to slices 0 (grey), 1 (colour), and 2: the grey one as if it were CT, in HU."""
    folder_of(NAME)
    place = tmp_path_factory.mktemp(NAME)
    export_model("nano", "huggingface", place / REPOSITORY, verify=False)
    sent = [values.astype(np.float32) for values in slices().values()]
    sent.append(sent[0] * 8 - 900)
    given = {f"slice.{number}": values for number, values in enumerate(sent)}
    return run_program(NAME, PROGRAM, [place], {**given, "clicks": np.array(json.dumps([CLICKS] * len(sent)))})


class OneMask(Tracker):
    """Gives one mask after one click, too, where ours chooses among three."""

    def _decode(self, *arguments: Any, multimask: bool) -> Decoded:
        return super()._decode(*arguments, multimask=False)


def our_mask(values: np.ndarray, clicks: int) -> np.ndarray:
    """Bool [H, W] of our predictor after the first clicks; one mask after one click too, as the server asks."""
    frame = torch.from_numpy(values if values.ndim == 3 else values[..., None]).permute(2, 0, 1)[None]
    points = np.array(CLICKS[:clicks])
    prompt = FramePrompt(0, 0, points=points[:, :2], labels=points[:, 2])
    found: np.ndarray = Predictor(OneMask(load_model("nano").sam).eval()).predict(frame, [prompt]).masks[0, 0].numpy()
    return found


def test_its_masks_after_each_click_are_ours(answer: dict[str, np.ndarray]) -> None:
    for number, (name, values) in enumerate(slices().items()):
        for clicks in (1, 2, 3):
            theirs, ours = answer[f"{number}.{clicks - 1}"], our_mask(values, clicks)
            assert 100 < ours.sum() < ours.size / 3, "the comparison proves nothing"
            assert overlap(theirs, ours) >= 0.99, (name, clicks)
        assert overlap(answer[f"{number}.0"], answer[f"{number}.1"]) < 0.99, "the second click changes nothing"


def test_it_does_not_window(answer: dict[str, np.ndarray]) -> None:
    """So the page asks for 8-bit images."""
    assert overlap(answer["2.1"], answer["0.1"]) < 0.5


def test_a_reset_forgets_the_clicks_and_keeps_the_slice(answer: dict[str, np.ndarray]) -> None:
    assert np.array_equal(answer["0.again"], answer["0.0"])
    assert np.array_equal(answer["1.again"], answer["1.0"]) and not np.array_equal(answer["0.0"], answer["1.0"])


def test_it_offers_clicks_on_slices_and_nothing_else(answer: dict[str, np.ndarray]) -> None:
    """What the page says of it: ITK-SNAP shows scribbles, lassos and volumes for its other model only."""
    model = next(one for one in json.loads(str(answer["models"])) if one["id"] == "SAM2")
    assert model == {"id": "SAM2", "channels": [1, 3], "dimensions": 2, "interactions": ["point"]}
