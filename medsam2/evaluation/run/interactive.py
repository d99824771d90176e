"""Runs a protocol on the objects of a case. With corrections it repeats: predict, compare, click, predict again.

Masks arrive frame by frame and are stored with one bit per pixel. Like a user, the correction rounds compare them with
the ground truth: the frame with the lowest IoU gets a click on its deepest error.

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

MAX_PARTS_PER_BATCH = 16
LATER_CANDIDATE_PENALTY = 1e4  # far larger than any predicted IoU
MAX_CACHED_SESSIONS = 16
PartMask = tuple[int, int, np.ndarray]
"""(part, frame, mask bool [H, W])"""


class PackedMask:
    """A bool mask [T, H, W] in packed bits, set frame by frame; frames that were never set are empty.

    Args:
        shape: (T, H, W).
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._frames: dict[int, np.ndarray] = {}

    def add(self, frame: int, mask: np.ndarray) -> None:
        """Add bool [H, W] to a frame (logical or)."""
        bits = np.packbits(mask)
        self._frames[frame] = self._frames[frame] | bits if frame in self._frames else bits

    def put(self, frame: int, mask: np.ndarray) -> None:
        """Set a frame to bool [H, W]."""
        self._frames[frame] = np.packbits(mask)

    def __contains__(self, frame: int) -> bool:
        return frame in self._frames

    def frame(self, frame: int) -> np.ndarray:
        """Mask of one frame, bool [H, W]."""
        _, height, width = self.shape
        if frame not in self._frames:
            return np.zeros((height, width), dtype=bool)
        return np.unpackbits(self._frames[frame], count=height * width).reshape(height, width).astype(bool)

    def clear_outside(self, first: int, last: int) -> None:
        """Clear the frames before `first` and after `last`."""
        self._frames = {frame: bits for frame, bits in self._frames.items() if first <= frame <= last}

    def dense(self) -> np.ndarray:
        """Unpack the mask of all frames, bool [T, H, W]."""
        whole = np.zeros(self.shape, dtype=bool)
        for frame in self._frames:
            whole[frame] = self.frame(frame)
        return whole


@dataclass(frozen=True, eq=False)
class Click:
    """A correction click. point: (x, y). label: 1 positive, 0 negative. depth: of the error, in pixels."""

    point: tuple[float, float]
    label: int
    depth: float


@dataclass(eq=False)
class Attempt:
    """The state of one object while a protocol runs.

    Attributes:
        parts: its prompts, one list for each part that is predicted separately. mask: the latest prediction.
        iou_history: (number of points so far, IoU) after each prediction that is compared for corrections.
        corrected: number of correction clicks among its points.
    """

    target: Target
    parts: list[list[FramePrompt]]
    mask: PackedMask
    iou_history: list[tuple[int, float]] = field(default_factory=list)
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
        """Number of points, positive and negative; the corners of a box do not count."""
        return sum(self.clicks_on(frame) for frame in self.prompted)

    def clicks_on(self, frame: int) -> int:
        """Number of points on one frame."""
        return sum(len(p.points) for p in self.prompts if p.frame == frame and p.points is not None)


def predict_objects(
    predictor: Predictor, frames: Frames, targets: Sequence[Target], protocol: ProtocolSettings
) -> list[Attempt]:
    """Predict several objects of one case together.

    Raises:
        ValueError: an object is on no frame.
    """
    attempts = [Attempt(target, apply(protocol, target), PackedMask(target.plane.shape)) for target in targets]
    corrected = protocol.corrections.most > 0
    with candidate_selection(predictor.tracker, protocol.candidate):
        if corrected and protocol.corrections.where == "worst":
            _correct_worst_frames(predictor, frames, attempts, protocol)
        else:
            images = ImagePredictor(predictor, frames)
            if corrected or protocol.direction == "alone":
                _predict_masks(attempts, images.predict)
            for attempt in attempts if corrected else ():
                _correct_prompted_frames(images, attempt, protocol.corrections)
            if protocol.direction != "alone":
                _predict_masks(
                    attempts, lambda prompts: _to_masks(predictor.stream(frames, prompts, protocol.direction))
                )
    if protocol.reach == "object":
        for attempt in attempts:
            present = np.flatnonzero(attempt.target.areas)
            attempt.mask.clear_outside(int(present[0]), int(present[-1]))
    return attempts


@contextmanager
def candidate_selection(tracker: Tracker, choice: Literal["best", "first"]) -> Iterator[None]:
    """Inside, `tracker` selects the candidate with the highest predicted IoU ("best", SAM 2's rule) or the first one.

    "first" lowers the predicted IoUs of the later candidates wherever the decoder compares them: among the three masks
    of an ambiguous prompt, and among those that replace an unstable single mask.
    """
    if choice == "best":
        yield
        return
    handle = tracker.sam.sam_mask_decoder.iou_prediction_head.register_forward_hook(_penalise_later_candidates)
    try:
        yield
    finally:
        handle.remove()


def _penalise_later_candidates(module: nn.Module, inputs: tuple[Any, ...], ious: Tensor) -> Tensor:
    """Lower ious [N, 4] (of the single mask, then of the three candidates) from the second candidate on."""
    return torch.cat([ious[:, :2], ious[:, 2:] - LATER_CANDIDATE_PENALTY], 1)


def _predict_masks(attempts: Sequence[Attempt], predict: Callable[[list[FramePrompt]], Iterator[PartMask]]) -> None:
    """Set the mask of each attempt to what `predict` returns for its prompts, in batches of up to 16 parts."""
    for attempt in attempts:
        attempt.mask = PackedMask(attempt.mask.shape)
    owners = [(attempt, part) for attempt in attempts for part in attempt.parts]
    for start in range(0, len(owners), MAX_PARTS_PER_BATCH):
        batch = owners[start : start + MAX_PARTS_PER_BATCH]
        prompts = [replace(prompt, object=i) for i, (_, part) in enumerate(batch) for prompt in part]
        for number, frame, mask in predict(prompts):
            batch[number][0].mask.add(frame, mask)


def _to_masks(results: Iterable[FrameResult]) -> Iterator[PartMask]:
    for result in results:
        masks = (result.logits > 0).cpu().numpy()
        yield from zip(result.objects, [result.frame] * len(masks), masks, strict=True)


class ImagePredictor:
    """Predicts frames as single images, without memory; caches the features of 16 frames for later rounds."""

    def __init__(self, predictor: Predictor, frames: Frames) -> None:
        self._predictor, self._frames = predictor, frames
        self._sessions: dict[int, Session] = {}

    def predict(self, prompts: Sequence[FramePrompt]) -> Iterator[PartMask]:
        """Predict each prompted frame; `prompts` must hold all prompts of an object on a frame."""
        for frame in sorted({prompt.frame for prompt in prompts}):
            frame_prompts = [replace(prompt, frame=0) for prompt in prompts if prompt.frame == frame]
            session = self._sessions.get(frame) or self._predictor.session([self._frames[frame]])
            if len(self._sessions) < MAX_CACHED_SESSIONS:
                self._sessions[frame] = session
            yield from ((number, frame, mask) for number, _, mask in _to_masks(session.prompt(frame_prompts)))


# --------------------------------------------------------------------------------------------------- corrections


def _correct_prompted_frames(images: ImagePredictor, attempt: Attempt, rules: Corrections) -> None:
    """Click on the prompted frames, the worst first, until the rules stop it."""
    (part,) = attempt.parts

    def predict(click: FramePrompt) -> np.ndarray:
        ((_, _, mask),) = images.predict([prompt for prompt in part if prompt.frame == click.frame])
        attempt.mask.put(click.frame, mask)
        return mask

    while (worst := _worst_frame(attempt, rules, attempt.prompted)) is not None:
        if not _click(attempt, rules, worst, attempt.mask.frame(worst), rules.each, predict):
            return


def _correct_worst_frames(
    predictor: Predictor, frames: Frames, attempts: Sequence[Attempt], protocol: ProtocolSettings
) -> None:
    """Propagate and click on the worst frame of each object, until every object is finished."""
    rules, session = protocol.corrections, predictor.session(frames)
    active = dict(enumerate(attempts))

    def predict(number: int, click: FramePrompt) -> np.ndarray:
        """A click on a tracked frame corrects the tracked mask; another frame is predicted from all its prompts."""
        attempt = active[number]
        prompts = [click] if click.frame in attempt.mask else [p for p in attempt.prompts if p.frame == click.frame]
        ((_, _, mask),) = _to_masks(session.prompt([replace(p, object=number) for p in prompts]))
        return mask

    initial = [replace(prompt, object=number) for number, attempt in active.items() for prompt in attempt.prompts]
    for number, frame, mask in list(_to_masks(session.prompt(initial))):
        remaining = rules.each - max(1, active[number].clicks_on(frame))  # the prompt counts in the first round
        _click(active[number], rules, frame, mask, remaining, partial(predict, number))
    while active:
        for attempt in active.values():
            attempt.mask = PackedMask(attempt.mask.shape)
        for number, frame, mask in _to_masks(session.propagate(protocol.direction)):
            active[number].mask.put(frame, mask)
        for number, attempt in list(active.items()):
            worst = _worst_frame(attempt, rules, range(len(attempt.target.plane)))
            if worst is None or not _click(
                attempt, rules, worst, attempt.mask.frame(worst), rules.each, partial(predict, number)
            ):
                del active[number], session.tracks[number]


def _worst_frame(attempt: Attempt, rules: Corrections, frames: Sequence[int]) -> int | None:
    """Return the frame with the lowest IoU, or None once the object has its maximum of clicks or is good enough.

    Also appends the IoU of all `frames` together to the history.
    """
    iou = pooled_iou(attempt.mask, attempt.target, frames)
    attempt.iou_history.append((attempt.clicks, iou))
    if attempt.corrected >= rules.most or iou >= rules.until:
        return None
    return min(frames, key=lambda frame: pooled_iou(attempt.mask, attempt.target, (frame,)))


def _click(
    attempt: Attempt,
    rules: Corrections,
    frame: int,
    mask: np.ndarray,
    count: int,
    predict: Callable[[FramePrompt], np.ndarray],
) -> bool:
    """Add up to `count` clicks on a frame; return False if no error on it was deep enough for one.

    Args:
        mask: the frame's mask, bool [H, W]. predict: returns its mask after a click was appended to the prompts.
    """
    (part,) = attempt.parts
    before = attempt.corrected
    for _ in range(min(count, rules.most - before)):
        click = next_click(mask, attempt.target.frame(frame))
        if click is None or click.depth <= rules.depth:
            break
        points, labels = np.asarray([click.point], np.float32), np.asarray([click.label], np.int32)
        part.append(FramePrompt(frame, 0, points=points, labels=labels))
        attempt.corrected += 1
        mask = predict(part[-1])
    return attempt.corrected > before


def next_click(prediction: np.ndarray, truth: np.ndarray) -> Click | None:
    """Click on the deepest point of the deeper error of a prediction, bool [H, W]; None without an error.

    Depth is the Euclidean distance to the nearest pixel without that error, or to the image border. Of equal depths,
    false negatives win over false positives.
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


def pooled_iou(mask: PackedMask, truth: Target, frames: Iterable[int]) -> float:
    """IoU of the pixels of all `frames` together; 1 if both masks are empty."""
    both = either = 0
    for frame in frames:
        predicted, true = mask.frame(frame), truth.frame(frame)
        both += int((predicted & true).sum())
        either += int((predicted | true).sum())
    return both / either if either else 1.0


def number_of_clicks(history: Sequence[tuple[int, float]], level: float, max_corrections: int) -> float:
    """Number of clicks (NoC) after which the IoU first reached `level`; NaN for an empty history.

    If it never did, the points of the prompt plus `max_corrections`, even if fewer were made, as is usual.
    """
    if not history:
        return math.nan
    return float(next((clicks for clicks, iou in history if iou >= level), history[0][0] + max_corrections))


def format_history(history: Sequence[tuple[int, float]]) -> str:
    """Format an IoU history as a table cell: "1:0.6120 2:0.7034"."""
    return " ".join(f"{clicks}:{iou:.4f}" for clicks, iou in history)
