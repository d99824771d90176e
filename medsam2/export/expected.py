"""The reference clip on our side: what every consumer of an export is asked to do, and what it should give.

One list for all formats: boxes, a click and a mask followed through the clip, and boxes, a click, and a click on an
earlier mask on one picture. `run_consumer` puts it to a process that has none of our code.

Legend: N objects, T frames, S the model's side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medsam2.errors import UserError
from medsam2.evaluation.predictor import FramePrompt, Predictor
from medsam2.export.verify import AGREEMENT, ReferenceClip, Verification, compare
from medsam2.model.build import LoadedModel, build_sam
from medsam2.model.memory import MemoryBank
from medsam2.model.tracker import Tracker
from medsam2.pixels import normalise
from medsam2.prompts.kinds import Prompts
from medsam2.prompts.strategies import deepest_point

PROPAGATED = "propagation from boxes, both ways"
SECONDS = 3600  # after which the other process is taken to hang
FOLLOWED = 4  # frames of the clips that start from a click and from a mask
SHOWN = ("max_logit_difference", "max_score_difference", "iou")


@dataclass(frozen=True, eq=False)
class Item:
    """One thing to do on both sides.

    Attributes:
        name: in the report. said: what the consumer reads, JSON values. inputs: tensors by name, for the consumer.
        expected: what we get: outputs of a graph, or logits [N, T, H, W] (of a picture: [N, 1 or 3, S/4, S/4]) and
            scores.
    """

    name: str
    said: dict[str, Any]
    inputs: dict[str, Tensor]
    expected: tuple[Tensor, ...]


def items_of(ours: LoadedModel, clip: ReferenceClip, memory_dtype: torch.dtype) -> list[Item]:
    """All that consumers are asked, clips first.

    Args:
        memory_dtype: in which the consumer keeps its memories; in another, logits move by up to 0.01.
    """
    # on a copy: a tracker changes how its network multiplies
    sam = build_sam(ours.spec)
    sam.load_state_dict(ours.sam.state_dict())
    tracker = Tracker(sam).eval()
    return [*_clips(Predictor(tracker, memory_dtype=memory_dtype), clip), *_images(tracker, clip)]


def _clips(predictor: Predictor, clip: ReferenceClip) -> list[Item]:
    """Boxes of all objects both ways; the first object from a click, and from a mask, a few frames forward."""
    frame, length = clip.prompts[0].frame, len(clip.frames)
    whole = _clip(predictor, PROPAGATED, clip, (0, length), clip.prompts)
    mask = (whole.expected[0][0, frame] > 0).numpy()
    if not mask.any():  # an untrained network may see nothing; any mask does to compare two programs
        x0, y0, x1, y1 = (int(value) for value in clip.prompts[0].box or (0, 0, 8, 8))
        mask[y0 : y1 + 1, x0 : x1 + 1] = True
    click = FramePrompt(0, 0, points=np.asarray([deepest_point(mask)]), labels=np.asarray([1]))
    some = frame, min(frame + FOLLOWED, length)
    return [
        whole,
        _clip(predictor, "propagation from a click", clip, some, (click,)),
        _clip(predictor, "propagation from a mask", clip, some, (FramePrompt(0, 0, mask=mask),)),
    ]


def _clip(
    predictor: Predictor, name: str, clip: ReferenceClip, frames: tuple[int, int], prompts: tuple[FramePrompt, ...]
) -> Item:
    found = predictor.predict(clip.frames[slice(*frames)], prompts, "both", logits=True)
    assert found.logits is not None
    tensors: dict[str, Tensor] = {}
    said = []
    for prompt in prompts:
        one: dict[str, Any] = {"object": prompt.object, "frame": prompt.frame}
        if prompt.mask is not None:
            one["mask"] = f"mask.{prompt.object}"
            tensors[one["mask"]] = torch.from_numpy(prompt.mask.copy())
        if prompt.box is not None:
            one["box"] = [float(value) for value in prompt.box]
        if prompt.points is not None and prompt.labels is not None:
            one |= {"points": prompt.points.tolist(), "labels": prompt.labels.tolist()}
        said.append(one)
    asked = {"kind": "clip", "frames": list(frames), "prompts": said}
    return Item(name, asked, tensors, (found.logits, found.scores))


def _images(tracker: Tracker, clip: ReferenceClip) -> list[Item]:
    """Boxes, a click, and a click on an earlier mask, on the prompted frame alone."""
    side, frame = tracker.image_size, clip.prompts[0].frame
    height, width = clip.frames.shape[-2:]
    scale = torch.tensor([side / width, side / height])
    boxes = [torch.tensor(prompt.box).reshape(2, 2) * scale for prompt in clip.prompts if prompt.box is not None]
    corners = torch.stack(boxes)
    boxed = Prompts(corners, torch.tensor([[2, 3]] * len(boxes)))
    clicked = Prompts(corners[:1].mean(1, keepdim=True), torch.tensor([[1]]))
    with torch.no_grad():
        features = tracker.encode(normalise(clip.frames[frame : frame + 1], side))
        every = features.select(torch.zeros(len(boxes), dtype=torch.int64))
        box = tracker.segment(every, MemoryBank(), 0, boxed)
        click = tracker.segment(features, MemoryBank(), 0, clicked)
        again = tracker.segment(features, MemoryBank(), 0, clicked, previous=click.logits)
    items = []
    for name, prompts, found, previous in (
        ("image, boxes", boxed, box, None),
        ("image, click, three masks", clicked, click, None),
        ("image, click on an earlier mask", clicked, again, click.logits),
    ):
        assert prompts.points is not None and prompts.labels is not None
        count = len(prompts.points)
        inputs = {
            "point_coords": prompts.points.float(),
            "point_labels": prompts.labels.float(),
            "mask_input": torch.zeros(count, 1, side // 4, side // 4) if previous is None else previous.clamp(-32, 32),
            "has_mask_input": torch.full((count,), float(previous is not None)),
        }
        asked = {"kind": "image", "frames": [frame, frame + 1]}
        items.append(Item(name, asked, inputs, (found.all_logits, found.ious)))
    return items


# ------------------------------------------------------------------------------------------------- the other side


def run_consumer(script: Path, files: Sequence[Path], items: Sequence[Item], shared: Mapping[str, Tensor]) -> list[Any]:
    """What `script FILES... REQUEST.npz ANSWER.npz` answers, started as a file of its own: tensors by item and name.

    Args:
        shared: tensors for all items, by name.

    Raises:
        UserError: it fails.
    """
    arrays = {name: value.numpy() for name, value in shared.items()}
    for number, item in enumerate(items):
        arrays |= {f"{number}.{name}": value.numpy() for name, value in item.inputs.items()}
    said = json.dumps([{**item.said, "inputs": list(item.inputs)} for item in items])
    arrays["items"] = np.frombuffer(said.encode(), np.uint8)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    with tempfile.TemporaryDirectory() as place:
        request, answer = Path(place) / "request.npz", Path(place) / "answer.npz"
        np.savez(request, **arrays)  # type: ignore[arg-type]  # its stub takes the names for options
        command = [
            sys.executable,
            "-B",
            str(script),
            *(str(file.resolve()) for file in files),
            str(request),
            str(answer),
        ]
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            wordy = next((line for line in reversed(lines) if line[:1].strip()), lines[-1])
            raise UserError(f"{files[0].name} does not load in a process of its own: {wordy}; nothing was written.")
        with np.load(answer, allow_pickle=False) as file:
            given = {name: torch.from_numpy(file[name]) for name in file.files}
    answers: list[dict[str, Tensor]] = [{} for _ in items]
    for name, value in given.items():
        number, _, what = name.partition(".")
        answers[int(number)][what] = value
    return answers


def compared(items: Sequence[Item], answers: Sequence[Mapping[str, Tensor]], clip: ReferenceClip) -> list[Verification]:
    """Differences of each item's `logits` and `scores`; a consumer may repeat the one mask of a picture."""
    found = []
    for item, answer in zip(items, answers, strict=True):
        theirs, scores = answer["logits"], answer["scores"]
        ours = item.expected[0].expand_as(theirs)
        found.append(compare(ours, theirs, item.expected[1].expand_as(scores), scores, clip))
    return found


def together(items: Sequence[Item], found: Sequence[Verification]) -> dict[str, Any]:
    """JSON values: what `Verification` has, the worst of all items, and under "items" that of each."""
    main = next(one for item, one in zip(items, found, strict=True) if item.name == PROPAGATED)
    worst = replace(
        main,
        max_logit_difference=max(one.max_logit_difference for one in found),
        max_score_difference=max(one.max_score_difference for one in found),
        iou=min(one.iou for one in found),
    )
    rows = {item.name: {key: asdict(one)[key] for key in SHOWN} for item, one in zip(items, found, strict=True)}
    return {**asdict(worst), "items": rows}


def refuse_other_masks(
    items: Sequence[Item], found: Sequence[Verification], whose: str, source: str, advice: str
) -> None:
    """Raise a `UserError` at the first item in which `whose` masks are not ours."""
    for item, one in zip(items, found, strict=True):
        if not one.passed:
            raise UserError(
                f"export of {source}: {whose} masks overlap ours by only {one.iou:.4f} on {one.clip} ({item.name}; at "
                f"least {AGREEMENT} is asked; largest logit difference {one.max_logit_difference:.3g}); nothing was "
                f"written. {advice}"
            )
