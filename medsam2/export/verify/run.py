"""Prove an export: its consumer, in a process without medsam2, is asked what our predictor is asked, and both compared.

Legend: N objects, T frames, H and W pixels of the clip, S the model's side.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medsam2.errors import UserError
from medsam2.export.verify.clip import ReferenceClip, at_model_side
from medsam2.export.verify.questions import FROM_A_MASK, FROM_BOXES, Question, reference_questions
from medsam2.model.build import LoadedModel

MIN_IOU = 0.999  # of the two sets of masks, over all frames of all objects
ABSENT_LOGIT = -512.0  # logits below it mean "object absent" (-1024 in the network's code)
CONSUMER_TIMEOUT_SECONDS = 3600  # after which the other process counts as hung
PROGRAMS = Path(__file__).with_name("consumers")


@dataclass(frozen=True)
class Consumer:
    """A program that a user of an export has.

    Attributes:
        name: for messages, such as "transformers".
        program: the file in `consumers/` that defines its `Consumer`.
        files: what it is given to load.
        loaded: how it loaded them, for the report.
        memory_dtype: in which it keeps its memories.
        max_logit_difference: how far mask logits may be from ours.
        min_iou_from_mask: overlap after a mask prompt, where the program treats it in another way than we do; the
            largest differences that are reported are then those of the other questions.
    """

    name: str
    program: str
    files: tuple[Path, ...]
    loaded: str
    memory_dtype: torch.dtype = torch.bfloat16
    max_logit_difference: float = math.inf
    min_iou_from_mask: float = MIN_IOU

    def lenient(self, question: str) -> bool:
        """Whether an answer may be further from ours than the others."""
        return question == FROM_A_MASK and self.min_iou_from_mask < MIN_IOU

    def tolerances(self, question: str) -> tuple[float, float]:
        """Smallest overlap and largest difference of logits of an answer."""
        return (self.min_iou_from_mask, math.inf) if self.lenient(question) else (MIN_IOU, self.max_logit_difference)


def verify_export(consumer: Consumer, model: LoadedModel, clip: ReferenceClip, scratch: Path) -> dict[str, Any]:
    """Ask the consumer of an export what we ask our own predictor, and compare the answers.

    Args:
        scratch: an empty folder for what the two processes exchange.

    Returns:
        JSON values: what `compare` says of the clip from boxes, but with the largest differences of all questions;
        `items` with those of each question; and the tolerances.

    Raises:
        UserError: the consumer does not load the files, or its answers are not ours.
    """
    # Every program is given frames of the model's side, so that its way of resizing pictures does not enter.
    clip = at_model_side(clip, model.spec.image_size)
    questions = reference_questions(model, clip, consumer.memory_dtype)
    answers = ask(consumer, model, questions, clip, scratch)
    differences = {
        question.name: compare(question.expected, answer) for question, answer in zip(questions, answers, strict=True)
    }
    for name, one in differences.items():
        min_iou, max_logit_difference = consumer.tolerances(name)
        close = one["iou"] >= min_iou and one["max_logit_difference"] <= max_logit_difference
        if not (close and math.isfinite(one["max_score_difference"])):
            raise UserError(
                f"export of {model.source}: the masks of {consumer.name} overlap ours by only {one['iou']:.4f} on "
                f"{clip.name} ({name}; at least {min_iou} is asked), its logits differ by "
                f"{one['max_logit_difference']:.3g} (at most {max_logit_difference:g}), its scores by "
                f"{one['max_score_difference']:.3g}; nothing was written. Is image_size the one that the checkpoint "
                "was trained with? If so, please report it with the run's config.yaml; --no-verify writes all the same."
            )
    return _report(consumer, clip, differences)


def _report(consumer: Consumer, clip: ReferenceClip, differences: Mapping[str, dict[str, float]]) -> dict[str, Any]:
    strict = [one for name, one in differences.items() if not consumer.lenient(name)]
    tolerances = {"iou": MIN_IOU, "iou_after_a_mask_prompt": consumer.min_iou_from_mask}
    if math.isfinite(consumer.max_logit_difference):
        tolerances["logits"] = consumer.max_logit_difference
    shown = ("max_logit_difference", "max_score_difference", "iou")
    return {
        "consumer": consumer.name,
        "clip": clip.name,
        "frames": len(clip.frames),
        "objects": len(clip.prompts),
        **differences[FROM_BOXES],
        "max_logit_difference": max(one["max_logit_difference"] for one in strict),
        "max_score_difference": max(one["max_score_difference"] for one in strict),
        "iou": min(one["iou"] for one in strict),
        "loaded": consumer.loaded,
        "items": {name: {key: one[key] for key in shown} for name, one in differences.items()},
        "tolerances": tolerances,
    }


def agreement(report: Mapping[str, Any]) -> str:
    """Summarise a report in one line for the user."""
    text = (
        f"verified with {report['consumer']} on {report['clip']}: largest difference of mask logits "
        f"{report['max_logit_difference']:.3g}, of object scores {report['max_score_difference']:.3g}, masks overlap "
        f"by {report['iou']:.5f} (IoU)"
    )
    empty = "; both masks are empty on that clip, which proves little: use --case SHARDS"
    return text if report["foreground"] else text + empty


def ask(
    consumer: Consumer, model: LoadedModel, questions: Sequence[Question], clip: ReferenceClip, scratch: Path
) -> list[list[Tensor]]:
    """The consumer's answers, in the order of the questions: the tensors that stand in `Question.expected`.

    The program runs in a separate process that cannot import medsam2.

    Raises:
        UserError: the program fails.
    """
    arrays = {"frames": clip.frames.numpy()}
    for number, question in enumerate(questions):
        arrays |= {f"{number}.{name}": value.numpy() for name, value in question.inputs.items()}
    requests = json.dumps([{**question.request, "inputs": list(question.inputs)} for question in questions])
    arrays["questions"] = np.frombuffer(requests.encode(), np.uint8)
    request, answer = scratch / "request.npz", scratch / "answer.npz"
    np.savez(request, **arrays)  # type: ignore[arg-type]  # its stub takes the names for options
    files = [PROGRAMS / "answer.py", PROGRAMS / consumer.program, request, answer, *consumer.files]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    process = subprocess.run(
        [sys.executable, "-B", "-P", *(str(file.resolve()) for file in files)],
        cwd=scratch, env=environment, capture_output=True, text=True, timeout=CONSUMER_TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        reason = next((line for line in reversed(lines) if line[:1].strip()), lines[-1])
        raise UserError(f"{consumer.name} does not load the export of {model.source}: {reason}; nothing was written.")
    with np.load(answer, allow_pickle=False) as file:
        return [
            [torch.from_numpy(file[f"{number}.{place}"]) for place in range(len(question.expected))]
            for number, question in enumerate(questions)
        ]


def compare(expected: Sequence[Tensor], answer: Sequence[Tensor]) -> dict[str, float]:
    """How far the consumer's answer is from ours, on all frames of all objects.

    Args:
        expected, answer: logits [N, T, H, W] and scores [N, T]; a consumer may repeat an image's one mask.

    Returns:
        max_logit_difference: largest absolute difference of mask logits where both say that the object is present.
        max_score_difference: likewise of the object scores (logits; of an image, of the predicted IoUs).
        iou: intersection over union of the two sets of mask pixels (1 if both are empty).
        compared: share of the mask logits that were compared: of frames on which both see the object.
        foreground: share of pixels in our masks; 0 would prove little.
    """
    logits, scores = answer
    ours, our_scores = expected[0].expand_as(logits), expected[1].expand_as(scores)
    both = (ours > ABSENT_LOGIT) & (logits > ABSENT_LOGIT)
    our_mask, mask = ours > 0, logits > 0
    union = int((our_mask | mask).sum())
    return {
        "max_logit_difference": float((ours - logits)[both].abs().max()) if both.any() else 0.0,
        "max_score_difference": float((our_scores - scores).abs().max()),
        "iou": int((our_mask & mask).sum()) / union if union else 1.0,
        "compared": float(both.float().mean()),
        "foreground": float(our_mask.float().mean()),
    }
