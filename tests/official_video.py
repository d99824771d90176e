"""The official video predictor on random weights that make masks worth comparing, given frames as a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from medsam2.inference.predictor import FramePrompt
from medsam2.model.build import VIDEO_PREDICTOR, ModelSpec, build_sam
from medsam2.model.tracker import Tracker
from medsam2.pixels import normalise

SPEC = ModelSpec("hiera_nano", image_size=128)
SEED = 0
LENGTH, HEIGHT, WIDTH = 22, 90, 110
POST_PROCESSING = {"fill_hole_area": 0, "binarize_mask_from_pts_for_mem_enc": True}
STABILITY = {
    "dynamic_multimask_via_stability": True,
    "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98,
}

SCALES = {  # logits and memories of a trained network's size, and memory that decides more than the image does
    "cross_attn_image.out_proj": 10.0,
    "memory_encoder.out_proj": 0.3,
    "image_encoder.neck": 0.2,
    "output_hypernetworks_mlps": 0.7,
}


def random_clip() -> torch.Tensor:
    """uint8 [T, 3, H, W]: two bright discs that move over a textured ground."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    frames = np.repeat(generator.normal(90, 25, (1, HEIGHT, WIDTH)), LENGTH, 0)
    for t in range(LENGTH):
        frames[t][(x - 30 - t) ** 2 + (y - 40) ** 2 < 200] += 90
        frames[t][(x - 80) ** 2 + (y - 55 + t) ** 2 < 120] -= 60
    return torch.from_numpy(frames.clip(0, 255).astype(np.uint8))[:, None].repeat(1, 3, 1, 1)


def lively(sam: torch.nn.Module) -> None:
    """Random weights, scaled until masks cross zero, object scores differ and memory matters."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(sam.named_parameters()):
            if parameter.ndim > 1:
                fan = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.6 / fan**0.5))
            elif "norm" not in name and "gamma" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for name, parameter in sam.named_parameters():
            for part, factor in SCALES.items():
                if part in name:
                    parameter.mul_(factor)
            if "gamma" in name:
                parameter.fill_(0.5)
            if name.endswith("pred_obj_score_head.layers.2.bias"):
                parameter.fill_(0.0)  # the object is there on most frames, not on all


def two_models(**overrides: Any) -> tuple[Any, Tracker]:
    """The official predictor and our tracker with the same weights."""
    torch.manual_seed(SEED)  # the prompt encoder holds a random buffer
    official = build_sam(SPEC, target=VIDEO_PREDICTOR, overrides={**POST_PROCESSING, **overrides}).eval()
    for name, value in STABILITY.items():
        setattr(official.sam_mask_decoder, name, value)
    lively(official)
    ours = build_sam(SPEC).eval()
    ours.load_state_dict(official.state_dict(), strict=True)
    return official, Tracker(ours).eval()


def black_folder(path: Path) -> Path:
    """What the official predictor is told to read, before it is handed the frames."""
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(path / "00000.jpg")
    return path


def begin(model: Any, folder: Path, frames: torch.Tensor) -> Any:
    """A state of the official predictor with these frames, uint8 [T, 3, H, W]."""
    state = model.init_state(str(folder))
    state["images"] = normalise(frames, SPEC.image_size)
    state["num_frames"], state["video_height"], state["video_width"] = len(frames), HEIGHT, WIDTH
    state["cached_features"] = {}
    return state


def say(model: Any, state: Any, rounds: Sequence[FramePrompt], before: Sequence[FramePrompt] = ()) -> None:
    """Prompt the official predictor; clicks after others on the same frame and object are added to them."""
    for index, prompt in enumerate(rounds):
        earlier = [*before, *rounds[:index]]
        again = any((p.frame, p.object) == (prompt.frame, prompt.object) for p in earlier)
        if prompt.mask is not None:
            model.add_new_mask(state, prompt.frame, prompt.object, prompt.mask)
        else:
            model.add_new_points_or_box(
                state, prompt.frame, prompt.object, points=prompt.points, labels=prompt.labels, box=prompt.box,
                clear_old_points=not again,
            )  # fmt: skip


def carry(model: Any, state: Any, count: int, direction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, T, H, W] of the official predictor, and which frames it visited [T]."""
    length = state["num_frames"]
    logits = torch.full((count, length, HEIGHT, WIDTH), -1024.0)
    visited = torch.zeros(length, dtype=torch.bool)
    passes = {"forward": [False], "backward": [True], "both": [False, True]}[direction]
    for reverse in passes:
        for frame, _, values in model.propagate_in_video(state, reverse=reverse):
            logits[:, frame], visited[frame] = values[:, 0], True
    return logits, visited


class TorchWithFullMemory:
    """`torch` with a `bfloat16` that is float32."""

    bfloat16 = torch.float32

    def __getattr__(self, name: str):
        return getattr(torch, name)
