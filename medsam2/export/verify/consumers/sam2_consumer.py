"""A user of Meta's code: loads an official export with `build_sam2_video_predictor` and `build_sam2`.

Their options are the defaults, but for the filling of holes (it needs compiled CUDA code).
"""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from sam2.build_sam import build_sam2, build_sam2_video_predictor
from sam2.sam2_image_predictor import SAM2ImagePredictor

ABSENT_LOGIT = -1024.0  # what SAM 2 gives where the object is not
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the package normalises frames


class Consumer:
    """Both predictors of a yaml and weights (`answer.py` calls it).

    An adapter of peft's is merged into the network. Legend: N objects, T frames, S the model's side.
    """

    banned = ()

    def __init__(self, config: str, weights: str, adapter: str | None = None) -> None:
        self.files = config, weights, adapter

    def load(self, build: Any) -> Any:
        """A model of the self-contained yaml, strictly loaded."""
        config, weights, adapter = self.files
        GlobalHydra.instance().clear()  # importing sam2 initialises it for the package's own files
        with hydra.initialize_config_dir(str(Path(config).parent), version_base="1.2"):
            model = build(Path(config).name, weights, device="cpu")
        if adapter is None:
            return model
        from peft import PeftModel

        return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()

    @cached_property
    def video(self) -> Any:
        """The predictor of videos."""
        predictor = self.load(build_sam2_video_predictor)
        predictor.fill_hole_area = 0
        return predictor

    @cached_property
    def picture(self) -> Any:
        """The predictor of pictures."""
        return SAM2ImagePredictor(self.load(build_sam2))

    @torch.inference_mode()
    def follow(self, frames: np.ndarray, prompts: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Logits [N, T, S, S] and object scores [N, T], propagated both ways from the prompts.

        The predictor reads JPEG folders and MP4 only: it is given one black JPEG, then the very frames, normalised.
        """
        length, side, objects = len(frames), frames.shape[-1], len({prompt["object"] for prompt in prompts})
        logits = np.full((objects, length, side, side), ABSENT_LOGIT, np.float32)
        scores = np.full((objects, length), np.nan, np.float32)
        with tempfile.TemporaryDirectory() as folder:
            Image.new("RGB", (side, side)).save(Path(folder) / "00000.jpg")
            state = self.video.init_state(folder)
        images = (torch.from_numpy(frames) / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        state.update(images=images, num_frames=length, cached_features={})
        for prompt in prompts:
            frame, number = prompt["frame"], prompt["object"]
            if "mask" in prompt:
                self.video.add_new_mask(state, frame, number, prompt["mask"])
            else:
                points = {key: prompt.get(key) for key in ("points", "labels", "box")}
                self.video.add_new_points_or_box(state, frame, number, **points)
        for reverse in (False, True):
            for frame, _, values in self.video.propagate_in_video(state, reverse=reverse):
                logits[:, frame] = values[:, 0].float().numpy()
        for index, outputs in state["output_dict_per_obj"].items():
            for kind in ("cond_frame_outputs", "non_cond_frame_outputs"):
                for frame, output in outputs[kind].items():
                    scores[index, frame] = float(output["object_score_logits"])
        return logits, scores

    @torch.inference_mode()
    def segment(self, frame: np.ndarray, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Logits [N, 1 or 3, S/4, S/4] and predicted IoUs [N, 1 or 3] of one picture [3, S, S]."""
        side = frame.shape[-1]
        # The package states the sizes of the feature maps for 1024 px.
        self.picture._bb_feat_sizes = [(side // 4,) * 2, (side // 8,) * 2, (side // 16,) * 2]
        self.picture.set_image(np.ascontiguousarray(np.moveaxis(frame, 0, -1)))
        labels = inputs["point_labels"]
        boxed = labels.shape[1] == 2 and (labels[0] == [2, 3]).all()
        prompts: dict[str, Any] = {"box": inputs["point_coords"].reshape(len(labels), -1)}
        if not boxed:
            prompts = {"point_coords": inputs["point_coords"][0], "point_labels": labels[0].astype(int)}
        if inputs["has_mask_input"].any():
            prompts["mask_input"] = inputs["mask_input"][0]
        _, ious, low = self.picture.predict(**prompts, multimask_output=not boxed, return_logits=True)
        return low.reshape(len(labels), -1, *low.shape[-2:]), ious.reshape(len(labels), -1)
