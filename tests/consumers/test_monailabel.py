"""MONAI Label's server segments a volume with an exported `.pt` and yaml, and gives our masks.

Legend: T slices, X and Y voxels of one, as MONAI Label sees it: x first.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from consumer_program import folder_of, overlap, run_program
from PIL import Image

from medsam2.export.run import export_model
from medsam2.export.verify.clip import generated_clip
from medsam2.inference.predictor import FramePrompt, Predictor
from medsam2.model.build import ModelSpec, load_model
from medsam2.model.tracker import Tracker

NAME = "monailabel"
PROGRAM = Path(__file__).with_name("monailabel_program.py")
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "tools" / "monailabel.md"
SIDE = 128  # of the volume: that of nano, so that Meta's loader and ours resize nothing in 3D
SHOWN = 3  # the prompted slice of LENGTH
LENGTH = 6
CLICKS = {"foreground": [[40, 50, SHOWN], [44, 46, SHOWN]], "background": [[88, 70, SHOWN]]}
ROI = [24, 36, 60, 66, SHOWN, SHOWN + 2]
ITEMS: dict[str, dict[str, Any]] = {
    "2D, clicks": {"model": "sam_2d", "params": CLICKS},
    "2D, a click": {"model": "sam_2d", "params": {"foreground": CLICKS["foreground"][:1]}},
    "2D, a box": {"model": "sam_2d", "params": {"roi": ROI}},
    "3D, clicks": {"model": "sam_3d", "params": {**CLICKS, "reset_state": True}},
    "3D, a click": {"model": "sam_3d", "params": {"foreground": CLICKS["foreground"][:1], "reset_state": True}},
    "3D, a box on two slices": {"model": "sam_3d", "params": {"roi": ROI, "reset_state": True}},
}
pytestmark = pytest.mark.slow  # the server alone takes a quarter of a minute to start


def volume() -> np.ndarray:
    """uint8 [T, Y, X]; the bright blob is where `CLICKS` and `ROI` say."""
    return generated_clip(LENGTH, SIDE).frames[:, 0].numpy()


def app_of_page(folder: Path) -> Path:
    """The app that docs/how-to/tools/monailabel.md tells users to write, for nano, with both exports in its folder."""
    lines = PAGE.read_text().split("\n    import os\n")[1].split("\n- **")[0]
    said = "\n".join(line.removeprefix("    ") for line in f"    import os\n{lines}".splitlines())
    assert "medsam2_tiny_512" in said
    (folder / "model").mkdir(parents=True)
    (folder / "main.py").write_text(said.replace("tiny_512", f"nano_{SIDE}"))
    for side in (SIDE, 1024):
        exported = folder.parent / f"exported_{side}"
        loaded = load_model("nano", ModelSpec("hiera_nano", image_size=side))
        export_model(loaded, "sam2", exported, verify=False)
        for file in [*exported.glob("*.pt"), *exported.glob("*.yaml")]:
            file.rename(folder / "model" / file.name)
    return folder


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder_of(NAME)
    place = tmp_path_factory.mktemp(NAME)
    app, studies, home = app_of_page(place / "app"), place / "images", place / "home"
    studies.mkdir()
    home.mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(volume()), str(studies / "scan.nii.gz"))
    items = [{**item, "image": "scan"} for item in ITEMS.values()]
    return run_program(
        NAME,
        PROGRAM,
        [app, studies],
        {"items": np.array(json.dumps(items))},
        {
            "HOME": str(home),  # it empties a folder in ~/.cache when it starts
            "MONAI_SAM_MODEL_PT": "medsam2_nano_1024.pt",
            "MONAI_SAM_MODEL_CFG": "medsam2_nano_1024.yaml",
        },
    )


def theirs(answer: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Mask [T, X, Y]."""
    number = list(ITEMS).index(name)
    assert answer[f"{number}.status"] == 200, name
    return answer[f"{number}.mask"].transpose(0, 2, 1)


def prompts(name: str, slices: Sequence[int]) -> list[FramePrompt]:
    """What `ITEMS` says of each slice, to our predictor: x and y change places, as MONAI Label has it."""
    said = ITEMS[name]["params"]
    if "roi" in said:
        x0, y0, x1, y1 = said["roi"][:4]
        return [FramePrompt(number, 0, box=(y0, x0, y1, x1)) for number in slices]
    kinds = {1: said["foreground"], 0: said.get("background", [])}
    points = [[y, x] for clicks in kinds.values() for x, y, _ in clicks]
    labels = [label for label, clicks in kinds.items() for _ in clicks]
    return [FramePrompt(number, 0, points=np.array(points), labels=np.array(labels)) for number in slices]


def our_slice(name: str) -> np.ndarray:
    """Mask [X, Y] at 1024 px; one mask from one click too, as the task asks."""
    sam = load_model("nano", ModelSpec("hiera_nano", image_size=1024)).sam
    sam.multimask_output_in_sam = False
    number = SHOWN + 1 if "roi" in ITEMS[name]["params"] else SHOWN
    frame = torch.from_numpy(volume()[number].T.copy())[None, None]
    found: np.ndarray = Predictor(Tracker(sam).eval()).predict(frame, prompts(name, [0])).masks[0, 0].numpy()
    return found


def our_volume(name: str, through_jpeg: bool = True) -> np.ndarray:
    """Masks [T, X, Y] at nano's side, of slices that went through JPEG files as the task's do, or of the volume."""
    slices = [np.ascontiguousarray(values.T) for values in volume()]
    frames = np.stack([squeezed(values) if through_jpeg else np.stack([values] * 3, -1) for values in slices])
    numbers = [SHOWN, SHOWN + 1] if "roi" in ITEMS[name]["params"] else [SHOWN]
    predictor = Predictor(Tracker(load_model("nano").sam).eval())
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2)
    found: np.ndarray = predictor.predict(clip, prompts(name, numbers), "forward").masks[0].numpy()
    return found


def squeezed(values: np.ndarray) -> np.ndarray:
    """uint8 [X, Y] -> [X, Y, 3], through a JPEG file of Pillow's default quality."""
    file = io.BytesIO()
    Image.fromarray(values).convert("RGB").save(file, "JPEG")
    return np.asarray(Image.open(file))


def test_the_2d_task_gives_our_masks_at_1024_px(answer: dict[str, np.ndarray]) -> None:
    for name in (name for name in ITEMS if name.startswith("2D")):
        found, number = theirs(answer, name), SHOWN + 1 if "roi" in ITEMS[name]["params"] else SHOWN
        ours = our_slice(name)
        assert 100 < ours.sum() < ours.size / 3, "the comparison proves nothing"
        assert overlap(found[number], ours) >= 0.99, name
        assert not np.delete(found, number, 0).any(), "another slice has a mask"


def test_the_3d_task_gives_our_masks_of_its_jpeg_slices_from_the_first_prompt_on(
    answer: dict[str, np.ndarray],
) -> None:
    for name in (name for name in ITEMS if name.startswith("3D")):
        found, ours = theirs(answer, name), our_volume(name)
        assert (ours[SHOWN:].reshape(LENGTH - SHOWN, -1).sum(1) > 100).all(), "the comparison proves nothing"
        assert overlap(found, ours) >= 0.99, name
        assert not found[:SHOWN].any(), "slices before the first prompt have masks"


def test_the_server_names_both_tasks_as_clients_look_for_them(answer: dict[str, np.ndarray]) -> None:
    models = json.loads(str(answer["info"]))
    assert {name: (one["type"], one["dimension"]) for name, one in models.items()} == {
        "sam_2d": ("deepgrow", 2),
        "sam_3d": ("deepgrow", 3),
    }
