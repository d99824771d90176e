"""The shipped weights give the logits of Meta's video predictor to 1e-4: 1 and 3 objects, every prompt, both ways."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from medsam2.inference.predictor import FramePrompt, Predictor
from medsam2.model.build import VIDEO_PREDICTOR, build_sam, load_model
from medsam2.model.tracker import Tracker
from medsam2.pixels import normalise

LENGTH, SIDE, START = 11, 128, 4  # more frames on both sides of the prompt than a frame attends to
CENTRES = ((40, 40), (88, 50), (60, 96))


@pytest.fixture(scope="module")
def models() -> tuple[Any, Tracker]:
    loaded = load_model("nano")
    overrides = {"fill_hole_area": 0, "binarize_mask_from_pts_for_mem_enc": True}
    official = build_sam(loaded.spec, target=VIDEO_PREDICTOR, overrides=overrides).eval()
    official.load_state_dict(loaded.sam.state_dict(), strict=True)
    official.sam_mask_decoder.dynamic_multimask_via_stability = True
    official.sam_mask_decoder.dynamic_multimask_stability_delta = 0.05
    official.sam_mask_decoder.dynamic_multimask_stability_thresh = 0.98
    return official, Tracker(loaded.sam).eval()


def moving_discs() -> Tensor:
    """uint8 [T, 1, S, S]: three bright discs that drift apart on noise."""
    noise = np.random.default_rng(0).normal(80, 12, (LENGTH, SIDE, SIDE))
    y, x = np.mgrid[:SIDE, :SIDE]
    for t in range(LENGTH):
        for n, (column, row) in enumerate(CENTRES):
            noise[t][(x - column - n * t + 4) ** 2 + (y - row - t + 4) ** 2 < 150 + 30 * n] += 70 + 15 * n
    return torch.from_numpy(noise.clip(0, 255).astype(np.uint8))[:, None]


def rounds(kind: str, count: int) -> list[FramePrompt]:
    """One prompt an object; for "corrected" a box, then a click on it and one off it."""
    prompts = []
    for n, (x, y) in enumerate(CENTRES[:count]):
        points = np.array([[x, y]], np.float32)
        if kind == "click":
            prompts.append(FramePrompt(START, n, points=points, labels=np.array([1], np.int32)))
        elif kind == "mask":
            rows, columns = np.mgrid[:SIDE, :SIDE]
            prompts.append(FramePrompt(START, n, mask=(columns - x) ** 2 + (rows - y) ** 2 < 160))
        else:
            prompts.append(FramePrompt(START, n, box=(x - 14, y - 14, x + 15, y + 15)))
        if kind == "corrected":
            for point, label in ((points, 1), (points + 25, 0)):
                prompts.append(FramePrompt(START, n, points=point, labels=np.array([label], np.int32)))
    return prompts


class _ExactMemory:
    """`torch` with a `bfloat16` that is float32: Meta's predictor rounds its memories, which would hide differences."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def official_logits(model: Any, folder: str, frames: Tensor, prompts: list[FramePrompt]) -> Tensor:
    state = model.init_state(folder)
    state["images"], state["num_frames"], state["cached_features"] = normalise(frames, SIDE), len(frames), {}
    state["video_height"] = state["video_width"] = SIDE
    for place, p in enumerate(prompts):
        if p.mask is not None:
            model.add_new_mask(state, p.frame, p.object, p.mask)
            continue
        first = all(q.object != p.object for q in prompts[:place])
        model.add_new_points_or_box(
            state, p.frame, p.object, points=p.points, labels=p.labels, box=p.box, clear_old_points=first
        )
    logits = torch.empty(1 + max(p.object for p in prompts), len(frames), SIDE, SIDE)
    for reverse in (False, True):
        for frame, _, values in model.propagate_in_video(state, reverse=reverse):
            logits[:, frame] = values[:, 0]
    return logits


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["click", "box", "mask", "corrected"])
def test_logits_are_the_official_predictors(
    models: tuple[Any, Tracker], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, kind: str, count: int
) -> None:
    official, tracker = models
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(tmp_path / "00000.jpg")
    monkeypatch.setattr(sys.modules["sam2.sam2_video_predictor"], "torch", _ExactMemory())
    frames, prompts = moving_discs(), rounds(kind, count)
    expected = official_logits(official, str(tmp_path), frames, prompts)
    ours = Predictor(tracker, memory_dtype=torch.float32).predict(frames, prompts, "both", logits=True).logits
    assert ours is not None
    assert (expected > 0).flatten(2).any(2).float().mean() > 0.5, "hardly anything is tracked: the test would be idle"
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
