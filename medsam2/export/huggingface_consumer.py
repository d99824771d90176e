"""What a user of transformers does with an exported folder, as a program of its own: it knows nothing of medsam2.

    python huggingface_consumer.py FOLDER REQUEST.npz ANSWER.npz

It is started as a file of its own by `expected.run_consumer`, whose request also holds `frames` uint8 [T, 3, S, S]. The
answer holds for item n `n.logits` float32 [N, T, S, S] (of a picture: [N, masks, S / 4, S / 4]) and `n.scores`: object
scores [N, T] (of a picture: predicted IoUs [N, masks]).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # a folder needs no network
ABSENT = -1024.0  # what SAM 2 gives as logits where the object is not
BOX = [2, 3]  # labels of a box's corners


def load(folder: str, kind: str) -> tuple[Any, Any]:
    """Model and processor ("clip" or "image"); exits where a tensor of the model is not in the file."""
    import transformers

    models: dict[str, Any] = {"clip": transformers.Sam2VideoModel, "image": transformers.Sam2Model}
    processors: dict[str, Any] = {"clip": transformers.Sam2VideoProcessor, "image": transformers.Sam2Processor}
    model, report = models[kind].from_pretrained(folder, output_loading_info=True)
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report.get(problem):
            sys.exit(f"{models[kind].__name__}: {problem} {sorted(map(str, report[problem]))[:3]}")
    return model.eval(), processors[kind].from_pretrained(folder)


@torch.inference_mode()
def follow(model: Any, processor: Any, frames: Tensor, prompts: list[Any], masks: Mapping[str, Any]) -> list[Tensor]:
    """Logits [N, T, S, S] and object scores [N, T] of all objects, prompted in one call, carried both ways."""
    names, frame, count = [prompt["object"] + 1 for prompt in prompts], prompts[0]["frame"], len(prompts)
    session = processor.init_video_session(video=frames, inference_device="cpu")
    said: dict[str, Any] = {}
    if "mask" in prompts[0]:
        said["input_masks"] = [masks[prompt["mask"]] for prompt in prompts]
    elif "box" in prompts[0]:
        said["input_boxes"] = [[prompt["box"] for prompt in prompts]]
    else:
        said["input_points"] = [[prompt["points"] for prompt in prompts]]
        said["input_labels"] = [[prompt["labels"] for prompt in prompts]]
    processor.add_inputs_to_inference_session(session, frame_idx=frame, obj_ids=names, **said)  # it empties `names`
    logits = torch.full((count, len(frames), *frames.shape[-2:]), ABSENT)
    scores = torch.full((count, len(frames)), float("nan"))
    model(session, frame_idx=frame)
    size = [[session.video_height, session.video_width]]
    for reverse in (False, True):
        for seen in model.propagate_in_video_iterator(session, start_frame_idx=frame, reverse=reverse):
            logits[:, seen.frame_idx] = processor.post_process_masks([seen.pred_masks], size, binarize=False)[0][:, 0]
            scores[:, seen.frame_idx] = seen.object_score_logits.reshape(count)
    return [logits, scores]


@torch.inference_mode()
def segment(model: Any, processor: Any, frame: Tensor, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Logits [N, masks, S / 4, S / 4] and predicted IoUs [N, masks] of one picture [3, S, S]."""
    points, labels = inputs["point_coords"], inputs["point_labels"].astype(int)
    boxed = labels.shape[1] == len(BOX) and (labels == BOX).all()
    said: dict[str, Any] = {"input_points": [points.tolist()], "input_labels": [labels.tolist()]}
    if boxed:
        said = {"input_boxes": [points.reshape(len(points), 4).tolist()]}
    prepared = processor(images=frame, return_tensors="pt", **said)
    prepared.pop("original_sizes")
    if inputs["has_mask_input"].any():
        prepared["input_masks"] = torch.from_numpy(inputs["mask_input"])
    found = model(**prepared, multimask_output=not boxed)
    return [found.pred_masks[0], found.iou_scores[0]]


def main(folder: str, request: str, answer: str) -> None:
    """Answer every item of the request."""
    with np.load(request, allow_pickle=False) as file:
        given = dict(file)
    frames = torch.from_numpy(given["frames"])
    loaded: dict[str, tuple[Any, Any]] = {}
    answers: dict[str, np.ndarray] = {}
    for number, item in enumerate(json.loads(bytes(given["items"]).decode())):
        inputs = {name: given[f"{number}.{name}"] for name in item["inputs"]}
        kind, (first, stop) = item["kind"], item["frames"]
        if kind not in loaded:
            loaded.clear()  # one model at a time in memory
            loaded[kind] = load(folder, kind)
        if kind == "clip":
            logits, scores = follow(*loaded[kind], frames[first:stop], item["prompts"], inputs)
        else:
            logits, scores = segment(*loaded[kind], frames[first], inputs)
        answers |= {f"{number}.logits": logits.float().numpy(), f"{number}.scores": scores.float().numpy()}
    if any(name.split(".")[0] == "medsam2" for name in sys.modules):
        sys.exit("medsam2 was imported: a user of transformers does not have it")
    np.savez(answer, **answers)  # type: ignore[arg-type]  # its stub takes the names for options


if __name__ == "__main__":
    main(*sys.argv[1:])
