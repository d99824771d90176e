"""Programs that PyPI has not: what they ask of an export, run on Meta's code with their own sequence of calls.

Their scripts were run by hand (docs/how-to/tools/medsam2.md); these tests hold what that showed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from consumer_program import overlap, sam2_checkout

from medsam2.export.run import export_model
from medsam2.inference.predictor import FramePrompt, Predictor
from medsam2.model.build import load_model
from medsam2.model.tracker import Tracker

PROGRAM = Path(__file__).with_name("medsam2_program.py")
STEM, KEY = "medsam2_nano_128", 3


def volume_of(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright ball that drifts through noise: uint8 [T, H, W] and where it is, bool [T, H, W]."""
    y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    centres = np.arange(7)[:, None, None] * 0.02
    inside = (x - 0.35 - centres) ** 2 + (y - 0.55 + centres) ** 2 < 0.17**2
    noise = np.random.default_rng(0).normal(90, 10, inside.shape)
    return (noise + 80 * inside).clip(0, 255).astype(np.uint8), inside


def box_of(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `sam2` package with the export where the plugin's server puts what a user uploads."""
    root = tmp_path_factory.mktemp("checkout")
    sam2_checkout(root)
    export_model("nano", "sam2", root / "exported", verify=False)
    weights = root / "checkpoints" / STEM.split(".")[0] / f"{STEM}.pt"
    weights.parent.mkdir(parents=True)
    shutil.copy(root / "exported" / f"{STEM}.pt", weights)
    for name in (f"custom_{STEM}.yaml", f"configs/{STEM}.yaml"):  # by the server; by a user of MedSAM2's scripts
        shutil.copy(root / "exported" / f"{STEM}.yaml", root / "sam2" / name)
    return root


def ask(checkout: Path, config: str, height: int, width: int) -> dict[str, np.ndarray]:
    """Masks by the program's names for them, of a `volume_of` this size."""
    volume, inside = volume_of(height, width)
    asked, answer = checkout / "request.npz", checkout / "answer.npz"
    np.savez(asked, volume=volume, key=KEY, box=box_of(inside[KEY]), mask=inside[KEY])
    weights = f"checkpoints/{STEM}/{STEM}.pt"
    done = subprocess.run(
        [sys.executable, "-B", str(PROGRAM), config, weights, str(asked), str(answer)],
        cwd=checkout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with np.load(answer, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def at_side(checkout: Path) -> dict[str, np.ndarray]:
    return ask(checkout, f"configs/{STEM}.yaml", 128, 128)


def ours(prompt: FramePrompt, volume: np.ndarray) -> np.ndarray:
    """Masks [T, H, W] as these programs follow: each direction on its own, then together."""
    predictor = Predictor(Tracker(load_model("nano").sam).eval())
    frames = torch.from_numpy(volume)[:, None]
    passes = [predictor.predict(frames, [prompt], direction).masks[0] for direction in ("forward", "backward")]
    masks: np.ndarray = (passes[0] | passes[1]).numpy()
    return masks


def test_medsam2_and_its_slicer_server_give_our_masks(at_side: dict[str, np.ndarray]) -> None:
    volume, inside = volume_of(128, 128)
    box = tuple(box_of(inside[KEY]).tolist())
    boxed = ours(FramePrompt(KEY, 0, box=box), volume)
    assert overlap(boxed, inside) > 0.8, "masks that miss the object prove little"
    assert overlap(at_side["box"], boxed) >= 0.999
    assert overlap(at_side["mask"], ours(FramePrompt(KEY, 0, mask=inside[KEY]), volume)) >= 0.999
    assert overlap(at_side["preview"], ours(FramePrompt(0, 0, box=box), volume[KEY : KEY + 1])[0]) >= 0.999


def test_the_image_predictor_with_metas_sizes_refuses_what_is_not_1024_px(at_side: dict[str, np.ndarray]) -> None:
    assert "size" in str(at_side["unsized"])


def test_slices_of_another_size_differ_by_their_bicubic_resizing(checkout: Path) -> None:
    found, (volume, inside) = ask(checkout, f"custom_{STEM}.yaml", 96, 150), volume_of(96, 150)
    boxed = ours(FramePrompt(KEY, 0, box=tuple(box_of(inside[KEY]).tolist())), volume)
    assert 0.95 <= overlap(found["box"], boxed) < 1
