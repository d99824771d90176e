"""Label Studio's SAM 2 backend: its calls on a checkout of sam2 that has our files, masks through its own encoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from consumer_program import folder_of, run_program, sam2_checkout
from PIL import Image

from medsam2.export.run import export_model
from medsam2.export.variants import load_variant
from medsam2.inference.predictor import FramePrompt, Predictor
from medsam2.model.build import LoadedModel
from medsam2.model.tracker import Tracker

NAME = "label_studio"
PROGRAM = Path(__file__).with_name("label_studio_program.py")
HEIGHT, WIDTH = 150, 200


def region(kind: str, label: str = "lesion", **value: float) -> dict[str, Any]:
    """What the front end sends for a mark: percent of the picture."""
    said = {"type": kind, "value": {**value, kind: [label]}, "original_width": WIDTH, "original_height": HEIGHT}
    return said | ({"is_positive": 1} if kind == "keypointlabels" else {})


REGIONS = {
    "box": [region("rectanglelabels", x=30, y=24, width=31, height=42)],
    "click": [region("keypointlabels", x=45.3, y=45.4)],
    "clicks": [
        region("keypointlabels", x=40.2, y=40.1),
        {**region("keypointlabels", x=80, y=80), "is_positive": 0},
    ],
}


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_variant("nano", image_size=1024)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model: LoadedModel) -> Path:
    """A checkout of sam2 with exports at 1024 and 128 px, and a local storage with a picture."""
    folder_of(NAME)
    place = tmp_path_factory.mktemp(NAME)
    sam2_checkout(place / "root")
    (place / "root" / "checkpoints").mkdir()
    for exported in (model, "nano"):
        for name in export_model(exported, "sam2", place / "exported", force=True, verify=False)[0].files:
            folder = {".pt": "checkpoints", ".yaml": "sam2/configs"}.get(Path(name).suffix)
            if folder:
                shutil.copy(place / "exported" / name, place / "root" / folder / name)
    y, x = np.mgrid[:HEIGHT, :WIDTH] / HEIGHT
    noise = np.random.default_rng(0).normal(90, 10, (HEIGHT, WIDTH, 3))
    inside = (x - 0.6) ** 2 + (y - 0.45) ** 2 < 0.2**2
    (place / "storage").mkdir()
    Image.fromarray((noise + 80 * inside[..., None]).clip(0, 255).astype(np.uint8)).save(place / "storage" / "a.png")
    return place


def ask(place: Path, stem: str) -> dict[str, np.ndarray]:
    items = {name: {"image": "/data/local-files/?d=a.png", "regions": regions} for name, regions in REGIONS.items()}
    environment = {
        "MODEL_CONFIG": f"configs/{stem}.yaml",
        "MODEL_CHECKPOINT": f"{stem}.pt",
        "DEVICE": "cpu",
        "LOCAL_FILES_DOCUMENT_ROOT": str(place / "storage"),
    }
    return run_program(NAME, PROGRAM, [place / "root"], {"items": np.array(json.dumps(items))}, environment)


@pytest.mark.slow
def test_best_of_three_masks_is_ours_for_boxes_and_clicks(place: Path, model: LoadedModel) -> None:
    answer = ask(place, "medsam2_nano_1024")
    frames = torch.from_numpy(np.array(Image.open(place / "storage" / "a.png"))).permute(2, 0, 1)[None]
    model.sam.multimask_max_pt_num = 8  # three masks for boxes and several clicks too, as it asks for
    predictor = Predictor(Tracker(model.sam).eval())
    for name in REGIONS:
        prompt = FramePrompt(
            0,
            0,
            box=tuple(answer[f"{name}.box"].tolist()) if name == "box" else None,
            points=answer.get(f"{name}.point_coords"),
            labels=None if name == "box" else answer[f"{name}.point_labels"].astype(np.int32),
        )
        mask, theirs = predictor.predict(frames, [prompt], "forward").masks[0, 0].numpy(), answer[name]
        assert 0.005 < mask.mean() < 0.9, f"{name}: an empty or full mask proves little"
        assert (mask & theirs).sum() / (mask | theirs).sum() >= 0.99, name


@pytest.mark.slow
def test_an_export_off_1024_px_is_refused_by_its_image_predictor(place: Path) -> None:
    with pytest.raises(AssertionError, match="RuntimeError: .*size"):
        ask(place, "medsam2_nano_128")
