"""Run a protocol on the objects of a case, in rounds where it has corrections: predict, compare, click, predict again.

Masks stream by frame after frame and are kept in one bit a pixel. What the rounds look at is the truth, as a user
would: the frame with the lowest IoU gets a click on its deepest error.

Legend: T frames, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from medsam2.evaluation.protocol.protocols import Target, apply
from medsam2.evaluation.settings import Corrections, ProtocolSettings
from medsam2.inference.features import Frames
from medsam2.inference.predictor import FramePrompt, FrameResult, Predictor, Session
from medsam2.model.tracker import Tracker
from medsam2.prompts.evaluation import deepest_point
from medsam2.prompts.kinds import NEGATIVE, POSITIVE

PARTS_AT_ONCE = 16
LATER_CANDIDATE_PENALTY = 1e4  # any predicted IoU is far smaller
STILLS_HELD = 16
PartMask = tuple[int, int, np.ndarray]
"""(part, frame, mask bool [H, W])"""


class PackedMask:
    """A bool mask [T, H, W] of which frames are set one by one; frames that were never set are empty.

    Args:
        shape: (T, H, W).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._frames: dict[int, np.ndarray] = {}

    def add(self, frame: int, mask: np.ndarray) -> None:
        """Join bool [H, W] to what is on a frame."""
        bits = np.packbits(mask)
        self._frames[frame] = self._frames[frame] | bits if frame in self._frames else bits

    def put(self, frame: int, mask: np.ndarray) -> None:
        """Set a frame to bool [H, W]."""
        self._frames[frame] = np.packbits(mask)

    def __contains__(self, frame: int) -> bool:
        return frame in self._frames

    def frame(self, frame: int) -> np.ndarray:
        """bool [H, W]."""
        _, height, width = self.shape
        if frame not in self._frames:
            return np.zeros((height, width), dtype=bool)
        return np.unpackbits(self._frames[frame], count=height * width).reshape(height, width).astype(bool)

    def keep(self, first: int, last: int) -> None:
        """Empty the frames before `first` and after `last`."""
        self._frames = {frame: bits for frame, bits in self._frames.items() if first <= frame <= last}

    def dense(self) -> np.ndarray:
        """bool [T, H, W]."""
        whole = np.zeros(self.shape, dtype=bool)
        for frame in self._frames:
            whole[frame] = self.frame(frame)
        return whole


@dataclass(frozen=True, eq=False)
class Click:
    """A correction: where (x, y), 1 or 0 for missed or too much, and how deep that error is in pixels."""

    point: tuple[float, float]
    label: int
    depth: float


@dataclass(eq=False)
class Attempt:
    """One object on its way through a protocol.

    Attributes:
        parts: its prompts, a list for each part that is predicted for itself. mask: what was predicted last.
        trail: (points given so far, IoU then) after each prediction that corrections look at; rising in points.
        corrected: correction clicks among its points.
    """

    target: Target
    parts: list[list[FramePrompt]]
    mask: PackedMask
    trail: list[tuple[int, float]] = field(default_factory=list)
    corrected: int = 0

    @property
    def prompts(self) -> tuple[FramePrompt, ...]:
        return tuple(prompt for part in self.parts for prompt in part)

    @property
    def prompted(self) -> tuple[int, ...]:
        """The frames that carry a prompt, in order."""
        return tuple(sorted({prompt.frame for prompt in self.prompts}))

    @property
    def clicks(self) -> int:
        """Points, positive and negative; the corners of a box are none."""
        return sum(self.clicks_on(frame) for frame in self.prompted)

    def clicks_on(self, frame: int) -> int:
        """Points on one frame."""
        return sum(len(p.points) for p in self.prompts if p.frame == frame and p.points is not None)


def run(predictor: Predictor, frames: Frames, targets: Sequence[Target], protocol: ProtocolSettings) -> list[Attempt]:
    """Predict objects of one case, in the same batches.

    Raises:
        ValueError: an object that is on no frame.
    """
    attempts = [Attempt(target, apply(protocol, target), PackedMask(target.plane.shape)) for target in targets]
    corrected = protocol.corrections.most > 0
    with chosen_candidate(predictor.tracker, protocol.candidate):
        if corrected and protocol.corrections.where == "worst":
            _correct_everywhere(predictor, frames, attempts, protocol)
        else:
            stills = Stills(predictor, frames)
            if corrected or protocol.direction == "alone":
                _fill(attempts, stills.look)
            for attempt in attempts if corrected else ():
                _correct_prompted(stills, attempt, protocol.corrections)
            if protocol.direction != "alone":
                _fill(attempts, lambda prompts: _carried(predictor.stream(frames, prompts, protocol.direction)))
    if protocol.reach == "object":
        for attempt in attempts:
            shown = np.flatnonzero(attempt.target.areas)
            attempt.mask.keep(int(shown[0]), int(shown[-1]))
    return attempts


@contextmanager
def chosen_candidate(tracker: Tracker, choice: Literal["best", "first"]) -> Iterator[None]:
    """Inside, `tracker` takes the candidate with the highest predicted IoU ("best", its own way) or always the first.

    "first" lowers the predicted IoUs of the later candidates, wherever the decoder's are compared: of the three masks
    of an ambiguous prompt, and of those that replace an unstable single mask.
    """
    if choice == "best":
        yield
        return
    handle = tracker.sam.sam_mask_decoder.iou_prediction_head.register_forward_hook(_first_wins)
    try:
        yield
    finally:
        handle.remove()


def _first_wins(module: nn.Module, inputs: tuple[Any, ...], ious: Tensor) -> Tensor:
    """ious [N, 4]: of the single mask, then of the three candidates."""
    return torch.cat([ious[:, :2], ious[:, 2:] - LATER_CANDIDATE_PENALTY], 1)


def _fill(attempts: Sequence[Attempt], predict: Callable[[list[FramePrompt]], Iterator[PartMask]]) -> None:
    """Set `mask` of each attempt to what `predict` finds for its prompts, at most 16 parts at once."""
    for attempt in attempts:
        attempt.mask = PackedMask(attempt.mask.shape)
    owners = [(attempt, part) for attempt in attempts for part in attempt.parts]
    for start in range(0, len(owners), PARTS_AT_ONCE):
        batch = owners[start : start + PARTS_AT_ONCE]
        prompts = [replace(prompt, object=i) for i, (_, part) in enumerate(batch) for prompt in part]
        for number, frame, mask in predict(prompts):
            batch[number][0].mask.add(frame, mask)


def _carried(results: Iterable[FrameResult]) -> Iterator[PartMask]:
    for result in results:
        masks = (result.logits > 0).cpu().numpy()
        yield from zip(result.objects, [result.frame] * len(masks), masks, strict=True)


class Stills:
    """Frames as pictures of their own, without memory; of the first 16 the features are kept for later rounds."""

    def __init__(self, predictor: Predictor, frames: Frames) -> None:
        self._predictor, self._frames = predictor, frames
        self._sessions: dict[int, Session] = {}

    def look(self, prompts: Sequence[FramePrompt]) -> Iterator[PartMask]:
        """What each prompted frame shows; all prompts of an object on a frame are given each time."""
        for frame in sorted({prompt.frame for prompt in prompts}):
            here = [replace(prompt, frame=0) for prompt in prompts if prompt.frame == frame]
            session = self._sessions.get(frame) or self._predictor.session([self._frames[frame]])
            if len(self._sessions) < STILLS_HELD:
                self._sessions[frame] = session
            yield from ((number, frame, mask) for number, _, mask in _carried(session.prompt(here)))


# --------------------------------------------------------------------------------------------------- corrections


def _correct_prompted(stills: Stills, attempt: Attempt, rules: Corrections) -> None:
    """Click on the prompted frames, the worst first, until the rules say that it is enough."""
    (part,) = attempt.parts

    def answer(prompt: FramePrompt) -> np.ndarray:
        ((_, _, mask),) = stills.look([said for said in part if said.frame == prompt.frame])
        attempt.mask.put(prompt.frame, mask)
        return mask

    while (worst := _worst_frame(attempt, rules, attempt.prompted)) is not None:
        if not _click(attempt, rules, worst, attempt.mask.frame(worst), rules.each, answer):
            return


def _correct_everywhere(
    predictor: Predictor, frames: Frames, attempts: Sequence[Attempt], protocol: ProtocolSettings
) -> None:
    """Predict everything and click on the worst frame of each object, until every object is finished."""
    rules, session = protocol.corrections, predictor.session(frames)
    going = dict(enumerate(attempts))

    def answer(number: int, prompt: FramePrompt) -> np.ndarray:
        """A tracked frame is corrected from memory's mask, another starts anew from all its prompts."""
        attempt = going[number]
        said = [prompt] if prompt.frame in attempt.mask else [p for p in attempt.prompts if p.frame == prompt.frame]
        ((_, _, mask),) = _carried(session.prompt([replace(p, object=number) for p in said]))
        return mask

    start = [replace(prompt, object=number) for number, attempt in going.items() for prompt in attempt.prompts]
    for number, frame, shown in list(_carried(session.prompt(start))):
        rest = rules.each - max(1, going[number].clicks_on(frame))  # the prompt is one of its frame's first round
        _click(going[number], rules, frame, shown, rest, partial(answer, number))
    while going:
        for attempt in going.values():
            attempt.mask = PackedMask(attempt.mask.shape)
        for number, frame, mask in _carried(session.propagate(protocol.direction)):
            going[number].mask.put(frame, mask)
        for number, attempt in list(going.items()):
            worst = _worst_frame(attempt, rules, range(len(attempt.target.plane)))
            if worst is None or not _click(
                attempt, rules, worst, attempt.mask.frame(worst), rules.each, partial(answer, number)
            ):
                del going[number], session.tracks[number]


def _worst_frame(attempt: Attempt, rules: Corrections, frames: Sequence[int]) -> int | None:
    """The one of `frames` with the lowest IoU, or None where the object has had its clicks or is good enough.

    Notes the IoU of all of them in the trail.
    """
    quality = overall_iou(attempt.mask, attempt.target, frames)
    attempt.trail.append((attempt.clicks, quality))
    if attempt.corrected >= rules.most or quality >= rules.until:
        return None
    return min(frames, key=lambda frame: overall_iou(attempt.mask, attempt.target, (frame,)))


def _click(
    attempt: Attempt,
    rules: Corrections,
    frame: int,
    shown: np.ndarray,
    count: int,
    answer: Callable[[FramePrompt], np.ndarray],
) -> bool:
    """Add up to `count` clicks on a frame; False where no error on it was deep enough for one.

    Args:
        shown: the frame's mask bool [H, W]. answer: its mask after a click that was just added to the prompts.
    """
    (part,) = attempt.parts
    before = attempt.corrected
    for _ in range(min(count, rules.most - before)):
        click = next_click(shown, attempt.target.frame(frame))
        if click is None or click.depth <= rules.depth:
            break
        points, labels = np.asarray([click.point], np.float32), np.asarray([click.label], np.int32)
        part.append(FramePrompt(frame, 0, points=points, labels=labels))
        attempt.corrected += 1
        shown = answer(part[-1])
    return attempt.corrected > before


def next_click(prediction: np.ndarray, truth: np.ndarray) -> Click | None:
    """The deepest point of the deeper of what is missed and what is too much, bool [H, W] each; None without error.

    Depth is the Euclidean distance to the nearest pixel without that error; the picture's border counts as one. Of
    equal depths, what is missed wins.
    """
    best: Click | None = None
    for error, label in ((truth & ~prediction, POSITIVE), (prediction & ~truth, NEGATIVE)):
        if not error.any():
            continue
        depth = float(ndimage.distance_transform_edt(np.pad(error, 1)).max())
        if best is None or depth > best.depth:
            best = Click(deepest_point(error), label, depth)
    return best


# ------------------------------------------------------------------------------------------------------- quality


def overall_iou(mask: PackedMask, truth: Target, frames: Iterable[int]) -> float:
    """IoU of the pixels of all `frames` together; 1 where both are empty."""
    both = either = 0
    for frame in frames:
        predicted, true = mask.frame(frame), truth.frame(frame)
        both += int((predicted & true).sum())
        either += int((predicted | true).sum())
    return both / either if either else 1.0


def clicks_to(trail: Sequence[tuple[int, float]], level: float, most: int) -> float:
    """Number of clicks (NoC) after which the IoU first reached `level`.

    Where it never did, those of the prompt and `most` corrections, also if fewer were given, as is usual. NaN without a
    trail, that is without corrections.
    """
    if not trail:
        return math.nan
    return float(next((clicks for clicks, iou in trail if iou >= level), trail[0][0] + most))


def trail_text(trail: Sequence[tuple[int, float]]) -> str:
    """The trail as a table's cell: "1:0.6120 2:0.7034"."""
    return " ".join(f"{clicks}:{iou:.4f}" for clicks, iou in trail)
