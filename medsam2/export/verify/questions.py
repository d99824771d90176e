"""The requests that every consumer of an export gets, and the answers of our predictor.

One list for all formats: boxes, a click and a mask followed through the clip, and boxes, a click, and a click on an
earlier mask on one picture.

Legend: N objects, T frames, S the model's side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medsam2.export.verify.clip import ReferenceClip
from medsam2.inference.predictor import FramePrompt, Predictor
from medsam2.model.build import LoadedModel, build_sam
from medsam2.model.memory_bank import MemoryBank
from medsam2.model.tracker import Tracker
from medsam2.pixels import normalise
from medsam2.prompts.evaluation import deepest_point
from medsam2.prompts.kinds import Prompts

FROM_BOXES, FROM_A_MASK = "propagation from boxes, both ways", "propagation from a mask"
FRAMES_FROM_ONE_PROMPT = 4  # length of the clips that start from a click and from a mask


@dataclass(frozen=True, eq=False)
class Question:
    """One thing to do on both sides.

    Attributes:
        name: in the report.
        request: what the consumer reads, JSON values; `kind` is clip or image.
        inputs: tensors by name, for the consumer.
        expected: our answer: logits [N, T, H, W] and scores [N, T] of a clip; of an image logits [N, 1 or 3, S/4, S/4]
            and predicted IoUs [N, 1 or 3].
    """

    name: str
    request: dict[str, Any]
    inputs: dict[str, Tensor]
    expected: tuple[Tensor, Tensor]


def reference_questions(model: LoadedModel, clip: ReferenceClip, memory_dtype: torch.dtype) -> list[Question]:
    """All questions about a clip of the model's side, those that follow objects first.

    Args:
        memory_dtype: in which the consumer keeps its memories; in another, logits move by up to 0.01.
    """
    # A copy, because a tracker changes how its network multiplies.
    sam = build_sam(model.spec)
    sam.load_state_dict(model.sam.state_dict())
    tracker = Tracker(sam).eval()
    return [*_clips(Predictor(tracker, memory_dtype=memory_dtype), clip), *_images(tracker, clip)]


def _clips(predictor: Predictor, clip: ReferenceClip) -> list[Question]:
    """Boxes of all objects both ways; the first object from a click, and from a mask, a few frames forward."""
    frame, length = clip.prompts[0].frame, len(clip.frames)
    from_boxes = _clip(predictor, FROM_BOXES, clip, (0, length), clip.prompts)
    mask = (from_boxes.expected[0][0, frame] > 0).numpy()
    if not mask.any():  # an untrained network may see nothing; any mask does to compare two programs
        x0, y0, x1, y1 = (int(value) for value in clip.prompts[0].box or (0, 0, 8, 8))
        mask[y0 : y1 + 1, x0 : x1 + 1] = True
    click = FramePrompt(0, 0, points=np.asarray([deepest_point(mask)]), labels=np.asarray([1]))
    frames = frame, min(frame + FRAMES_FROM_ONE_PROMPT, length)
    return [
        from_boxes,
        _clip(predictor, "propagation from a click", clip, frames, (click,)),
        _clip(predictor, FROM_A_MASK, clip, frames, (FramePrompt(0, 0, mask=mask),)),
    ]


def _clip(
    predictor: Predictor, name: str, clip: ReferenceClip, frames: tuple[int, int], prompts: tuple[FramePrompt, ...]
) -> Question:
    prediction = predictor.predict(clip.frames[slice(*frames)], prompts, "both", logits=True)
    assert prediction.logits is not None
    masks: dict[str, Tensor] = {}
    plain_prompts = []
    for prompt in prompts:
        plain: dict[str, Any] = {"object": prompt.object, "frame": prompt.frame}
        if prompt.mask is not None:
            plain["mask"] = f"mask.{prompt.object}"
            masks[plain["mask"]] = torch.from_numpy(prompt.mask.copy())
        geometry = {key: getattr(prompt, key) for key in ("box", "points", "labels")}
        plain |= {key: np.asarray(value).tolist() for key, value in geometry.items() if value is not None}
        plain_prompts.append(plain)
    request = {"kind": "clip", "frames": list(frames), "prompts": plain_prompts}
    return Question(name, request, masks, (prediction.logits, prediction.scores))


def _images(tracker: Tracker, clip: ReferenceClip) -> list[Question]:
    """Boxes, a click, and a click on an earlier mask, on the prompted frame alone."""
    side, frame = tracker.image_size, clip.prompts[0].frame
    corners = torch.tensor([prompt.box for prompt in clip.prompts]).reshape(-1, 2, 2)
    boxed = Prompts(corners, torch.tensor([[2, 3]] * len(corners)))
    clicked = Prompts(corners[:1].mean(1, keepdim=True), torch.tensor([[1]]))
    with torch.no_grad():
        features = tracker.encode(normalise(clip.frames[frame : frame + 1], side))
        repeated = features.select(torch.zeros(len(corners), dtype=torch.int64))
        from_boxes = tracker.segment(repeated, MemoryBank(), 0, boxed)
        from_click = tracker.segment(features, MemoryBank(), 0, clicked)
        corrected = tracker.segment(features, MemoryBank(), 0, clicked, previous=from_click.logits)
    questions = []
    for name, prompts, tracked, previous in (
        ("image, boxes", boxed, from_boxes, None),
        ("image, click, three masks", clicked, from_click, None),
        ("image, click on an earlier mask", clicked, corrected, from_click.logits),
    ):
        assert prompts.points is not None and prompts.labels is not None
        count = len(prompts.points)
        inputs = {
            "point_coords": prompts.points.float(),
            "point_labels": prompts.labels.float(),
            "mask_input": torch.zeros(count, 1, side // 4, side // 4) if previous is None else previous.clamp(-32, 32),
            "has_mask_input": torch.full((count,), float(previous is not None)),
        }
        request = {"kind": "image", "frames": [frame, frame + 1]}
        questions.append(Question(name, request, inputs, (tracked.all_logits, tracked.ious)))
    return questions
