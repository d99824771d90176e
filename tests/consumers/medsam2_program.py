"""What MedSAM2's scripts and the 3D Slicer plugin's server do, in a checkout that has an exported yaml and weights.

    python medsam2_program.py CONFIG CHECKPOINT REQUEST.npz ANSWER.npz

MedSAM2's predictor is the one that Meta keeps as `sam2_video_predictor_legacy`, given frames instead of a folder of
JPEGs. It starts here from the working folder's `sam2` package, as theirs does. Their scripts run on CUDA in bfloat16;
this one on the CPU, in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

sys.path.insert(0, str(Path.cwd()))
import sam2
from sam2 import sam2_video_predictor_legacy as legacy
from sam2.build_sam import build_sam2, build_sam2_video_predictor
from sam2.sam2_image_predictor import SAM2ImagePredictor

LEGACY = "++model._target_=sam2.sam2_video_predictor_legacy.SAM2VideoPredictor"
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def frames_of(volume: np.ndarray, side: int) -> torch.Tensor:
    """uint8 [T, H, W] to the network's input [T, 3, S, S], by PIL and in float64 as there."""
    pictures = [np.asarray(Image.fromarray(slice_).convert("RGB").resize((side, side))) for slice_ in volume]
    return torch.from_numpy(((np.stack(pictures) / 255.0 - MEAN) / STD).transpose(0, 3, 1, 2))


def follow(predictor: Any, frames: torch.Tensor, size: tuple[int, int], prompt: Callable[[Any], Any]) -> np.ndarray:
    """Masks [T, H, W]: forward from the prompt, everything forgotten, prompted again, backward."""
    masks = np.zeros((len(frames), *size), bool)
    legacy.load_video_frames = lambda **_: (frames, *size)
    state = predictor.init_state(video_path="")
    for reverse in (False, True):
        prompt(state)
        for frame, _, logits in predictor.propagate_in_video(state, reverse=reverse):
            masks[frame] |= (logits[0, 0] > 0).numpy()
        predictor.reset_state(state)
    return masks


def preview(config: str, checkpoint: str, slice_: np.ndarray, box: np.ndarray, sized: bool) -> np.ndarray:
    """Mask [H, W] of a box on one slice (float RGB in 0..1), by the package's image predictor.

    sized: whether it derives the sizes of its features from the model, or keeps those of 1024 px as Meta's does.
    """
    predictor = SAM2ImagePredictor(build_sam2(config, checkpoint, device="cpu"))
    if sized:
        side = predictor.model.image_size
        predictor._bb_feat_sizes = [(side // step, side // step) for step in (4, 8, 16)]
    predictor.set_image(np.repeat(slice_[..., None] / 255.0, 3, 2).astype(np.float32))
    masks, _, _ = predictor.predict(box=box[None], multimask_output=False)
    found: np.ndarray = masks[0] > 0
    return found


@torch.inference_mode()
def main(config: str, checkpoint: str, request: str, answer: str) -> None:
    assert Path(sam2.__file__).parent.parent == Path.cwd(), "not the checkout's package"
    with np.load(request, allow_pickle=False) as file:
        given = dict(file)
    volume, key = given["volume"], int(given["key"])
    side = yaml.safe_load((Path("sam2") / config).read_text())["model"]["image_size"]  # as the plugin's server finds it
    frames, size = frames_of(volume, side), volume.shape[1:]
    predictor = build_sam2_video_predictor(config, checkpoint, device="cpu", hydra_overrides_extra=[LEGACY])
    found = {
        "box": follow(
            predictor, frames, size, lambda state: predictor.add_new_points_or_box(state, key, 1, box=given["box"])
        ),
        "mask": follow(predictor, frames, size, lambda state: predictor.add_new_mask(state, key, 1, given["mask"])),
        "preview": preview(config, checkpoint, volume[key], given["box"], sized=True),
    }
    try:
        preview(config, checkpoint, volume[key], given["box"], sized=False)
        said = ""
    except RuntimeError as error:
        said = str(error)
    np.savez(answer, unsized=np.array(said), **found)  # type: ignore[arg-type]  # its stub takes the names for options


if __name__ == "__main__":
    main(*sys.argv[1:])
