"""A user of transformers: loads an exported folder with its models and processors."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # a folder needs no network
ABSENT_LOGIT = -1024.0  # what SAM 2 gives where the object is not
BOX_LABELS = [2, 3]  # of a box's corners


def load(folder: str, name: str) -> tuple[Any, Any]:
    """Model and processor; exits where a tensor of the model is not in the file."""
    import transformers

    model, report = getattr(transformers, f"{name}Model").from_pretrained(folder, output_loading_info=True)
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report.get(problem):
            sys.exit(f"{name}Model: {problem} {sorted(map(str, report[problem]))[:3]}")
    return model.eval(), getattr(transformers, f"{name}Processor").from_pretrained(folder)


class Consumer:
    """`Sam2VideoModel` and `Sam2Model` of a folder (`answer.py` calls it).

    Legend: N objects, T frames, S the model's side; frames are RGB of that side.
    """

    banned = ("sam2",)

    def __init__(self, folder: str) -> None:
        self.load = functools.cache(functools.partial(load, folder))

    @torch.inference_mode()
    def follow(self, frames: np.ndarray, prompts: list[Any]) -> tuple[Tensor, Tensor]:
        """Logits [N, T, S, S] and object scores [N, T] of all objects, prompted in one call, carried both ways."""
        model, processor = self.load("Sam2Video")
        frame, count = prompts[0]["frame"], len(prompts)
        session = processor.init_video_session(video=torch.from_numpy(frames), inference_device="cpu")
        inputs: dict[str, Any] = {}
        if "mask" in prompts[0]:
            inputs["input_masks"] = [prompt["mask"] for prompt in prompts]
        elif "box" in prompts[0]:
            inputs["input_boxes"] = [[prompt["box"] for prompt in prompts]]
        else:
            inputs["input_points"] = [[prompt["points"] for prompt in prompts]]
            inputs["input_labels"] = [[prompt["labels"] for prompt in prompts]]
        names = [prompt["object"] + 1 for prompt in prompts]
        processor.add_inputs_to_inference_session(session, frame_idx=frame, obj_ids=names, **inputs)
        logits = torch.full((count, len(frames), *frames.shape[-2:]), ABSENT_LOGIT)
        scores = torch.full((count, len(frames)), float("nan"))
        model(session, frame_idx=frame)
        size = [[session.video_height, session.video_width]]
        for reverse in (False, True):
            for output in model.propagate_in_video_iterator(session, start_frame_idx=frame, reverse=reverse):
                masks = processor.post_process_masks([output.pred_masks], size, binarize=False)[0]
                logits[:, output.frame_idx] = masks[:, 0]
                scores[:, output.frame_idx] = output.object_score_logits.reshape(count)
        return logits, scores

    @torch.inference_mode()
    def segment(self, frame: np.ndarray, inputs: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
        """Logits [N, 1 or 3, S/4, S/4] and predicted IoUs [N, 1 or 3] of one picture [3, S, S]."""
        model, processor = self.load("Sam2")
        points, labels = inputs["point_coords"], inputs["point_labels"].astype(int)
        boxed = labels.shape[1] == len(BOX_LABELS) and (labels == BOX_LABELS).all()
        prompts: dict[str, Any] = {"input_points": [points.tolist()], "input_labels": [labels.tolist()]}
        if boxed:
            prompts = {"input_boxes": [points.reshape(len(points), 4).tolist()]}
        prepared = processor(images=torch.from_numpy(frame), return_tensors="pt", **prompts)
        prepared.pop("original_sizes")
        if inputs["has_mask_input"].any():
            prepared["input_masks"] = torch.from_numpy(inputs["mask_input"])
        outputs = model(**prepared, multimask_output=not boxed)
        return outputs.pred_masks[0].float(), outputs.iou_scores[0].float()
