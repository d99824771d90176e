"""Objects carried through one clip: prompts go in, tracked frames come out, corrections go in again.

Every object has a memory bank of its own. A frame's network parts run once for all objects that are tracked there,
also where these were prompted on different frames.

Legend: N objects, n of them on a frame, C channels, H and W pixels of the given frames, S model input side, h = S / 16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medsam2.evaluation.settings import Direction
from medsam2.fast.attention import recall
from medsam2.inference.features import FrameFeatures, Frames
from medsam2.model.memory_bank import Attended, Memory, MemoryBank
from medsam2.model.tracker import Decoded, Features
from medsam2.prompts.kinds import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, Prompts

if TYPE_CHECKING:
    from medsam2.inference.predictor import Predictor


@dataclass(frozen=True, eq=False)
class FramePrompt:
    """What a user says about one object on one frame: a box and or points, or else a mask.

    Several for the same frame and object are rounds of correction, in the order given: points add up, and each round
    sees the mask of the one before.

    Attributes:
        frame: index in the clip. object: 0 to N - 1.
        box: (x0, y0, x1, y1) in pixels of the given frames.
        points: float [P, 2] of (x, y), likewise. labels: int [P], 1 on the object, 0 off it.
        mask: bool [H, W], taken as the frame's mask.
    """

    frame: int
    object: int
    box: tuple[float, float, float, float] | None = None
    points: np.ndarray | None = None
    labels: np.ndarray | None = None
    mask: np.ndarray | None = None

    def __post_init__(self) -> None:
        pointed = self.box is not None or self.points is not None
        if pointed == (self.mask is not None):
            raise ValueError("a prompt is either a box and or points, or a mask")
        if (self.points is None) != (self.labels is None):
            raise ValueError("points and labels come together")

    def as_points(self) -> tuple[np.ndarray, np.ndarray]:
        """Points [P, 2] and labels [P], a box as its two corners first."""
        points, labels = np.zeros((0, 2), np.float32), np.zeros(0, np.int32)
        if self.box is not None:
            points = np.asarray(self.box, np.float32).reshape(2, 2)
            labels = np.asarray([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], np.int32)
        if self.points is not None:
            points = np.concatenate([points, np.asarray(self.points, np.float32).reshape(-1, 2)])
            labels = np.concatenate([labels, np.asarray(self.labels, np.int32).reshape(-1)])
        return points, labels


@dataclass(frozen=True, eq=False)
class FrameResult:
    """One visited frame: the objects seen there, their logits [n, H, W] and object scores [n] (logits)."""

    frame: int
    objects: tuple[int, ...]
    logits: Tensor
    scores: Tensor


@dataclass
class Track:
    """One object: what was said and decoded on its prompted frames, and its memory.

    Attributes:
        said: points and labels by prompted frame. prompted: their outcome. fresh: those not yet memorised.
        near: memories of the forward pass that the backward pass sees across the prompted frame.
        seen: [1, 1, 4h, 4w] logits of visited frames and whether they were visited backward; in sessions only.
    """

    object: int
    said: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    prompted: dict[int, Decoded] = field(default_factory=dict)
    fresh: set[int] = field(default_factory=set)
    bank: MemoryBank = field(default_factory=MemoryBank)
    near: dict[int, Memory] = field(default_factory=dict)
    seen: dict[int, tuple[Tensor, bool]] = field(default_factory=dict)

    @property
    def first(self) -> int:
        return min(self.prompted)


class Session:
    """One clip under work.

    `prompt` may be called again after `propagate`: a frame that was tracked is then corrected, with its memory and mask
    in view, and guides the next propagation like the frames prompted at the start (the official predictor with
    `add_all_frames_to_correct_as_cond`). New objects may be added at any time.

    Args:
        predictor: runs the network. frames: see `Predictor.predict`.
        keep: hold memories and masks of all frames, so that frames can be corrected later: 0.2 MB an object and frame
            at 512 px. Otherwise what is held does not depend on the number of frames.
    """

    def __init__(self, predictor: Predictor, frames: Frames, keep: bool = True) -> None:
        self._predictor, self.keep = predictor, keep
        self.tracker, self.policy = predictor.tracker, predictor.policy
        self.size = tuple(frames[0].shape[-2:])
        self.length = len(frames)
        self.features = FrameFeatures(self.tracker, frames, predictor.batch_frames, predictor.cache_frames)
        self.tracks: dict[int, Track] = {}

    # ------------------------------------------------------------------------------------------ prompted frames

    def prompt(self, prompts: Sequence[FramePrompt], step: int = 1) -> list[FrameResult]:
        """Decode every prompted frame and memorise it; its masks, frame by frame.

        Args:
            step: +1 or -1, the direction in which frames are encoded ahead.

        Raises:
            ValueError: a frame out of range.
        """
        rounds: dict[int, dict[int, list[FramePrompt]]] = {}
        for prompt in prompts:
            if not 0 <= prompt.frame < self.length:
                raise ValueError(f"a prompt is on frame {prompt.frame}, but the frames are 0 to {self.length - 1}")
            rounds.setdefault(prompt.frame, {}).setdefault(prompt.object, []).append(prompt)
        results = []
        with self._predictor.context():
            for frame in sorted(rounds, reverse=step < 0):
                tracks = [self.tracks.setdefault(index, Track(index)) for index in sorted(rounds[frame])]
                decoded = self._decode(rounds[frame], tracks, frame, step)
                for track, row in zip(tracks, _rows(decoded), strict=True):
                    track.prompted[frame] = row
                    track.fresh.add(frame)
                if not self.keep:
                    self._settle(frame, step)
                results.append(self._result(frame, tracks, decoded))
        return results

    def _decode(self, prompts: dict[int, list[FramePrompt]], tracks: list[Track], frame: int, step: int) -> Decoded:
        """Decode one frame's prompts, round by round; objects with as many points each are one batch."""
        decoded: dict[int, Decoded] = {}
        for turn in range(max(len(rounds) for rounds in prompts.values())):
            batches: dict[tuple[int, bool, bool], list[Track]] = {}
            for track in tracks:
                if turn < len(prompts[track.object]):
                    points = self._say(track, prompts[track.object][turn])
                    corrects = track.object in decoded or frame in track.prompted or frame in track.seen
                    batches.setdefault((points, corrects, frame in track.seen), []).append(track)
            for (points, corrects, tracked), batch in batches.items():
                given = self._points(batch, frame) if points else self._masks([prompts[t.object][turn] for t in batch])
                previous = None
                if corrects and points:
                    before = [decoded.get(track.object, track.prompted.get(frame)) for track in batch]
                    rows = [
                        was.logits if was is not None else track.seen[frame][0]
                        for track, was in zip(batch, before, strict=True)
                    ]
                    previous = torch.cat([row.to(self.tracker.device) for row in rows])
                features = self.features.at(frame, len(batch), step)
                result = self.tracker.segment(
                    features,
                    MemoryBank(),
                    frame,
                    given,
                    previous,
                    initial=not tracked,
                    conditioned=self._again(batch, features, frame) if tracked and points else None,
                )
                decoded.update(zip([t.object for t in batch], _rows(result), strict=True))
        return _join([decoded[track.object] for track in tracks])

    def _settle(self, frame: int, step: int) -> None:
        """Memorise what was said on a frame; until then it is seen by no other, as in the official predictor."""
        tracks = [track for track in self.tracks.values() if frame in track.fresh]
        if tracks:
            decoded = _join([track.prompted[frame] for track in tracks])
            with self._predictor.context():
                self._remember(tracks, decoded, self.features.at(frame, len(tracks), step), frame, conditioning=True)
        for track in tracks:
            track.fresh.remove(frame)

    def _say(self, track: Track, prompt: FramePrompt) -> int:
        """Add to what was said about an object on a frame; the number of points now, 0 for a mask."""
        points, labels = prompt.as_points()
        before = track.said.get(prompt.frame)
        if before is not None and prompt.mask is None and prompt.box is None:  # a box or a mask replaces all points
            points, labels = np.concatenate([before[0], points]), np.concatenate([before[1], labels])
        track.said[prompt.frame] = points, labels
        return len(points)

    def _again(self, tracks: list[Track], features: Features, frame: int) -> Tensor:
        """The features of a tracked frame conditioned on memory, as when it was tracked."""
        attended = [[self._attend(track, features, frame, track.seen[frame][1])] for track in tracks]
        return torch.cat([recall(self.tracker, features, memories) for memories in attended])

    def _points(self, tracks: list[Track], frame: int) -> Prompts:
        device, side = self.tracker.device, self.tracker.image_size
        points = torch.from_numpy(np.stack([track.said[frame][0] for track in tracks])).to(device)
        labels = torch.from_numpy(np.stack([track.said[frame][1] for track in tracks])).to(device)
        scale = torch.tensor([self.size[1], self.size[0]], dtype=torch.float32, device=device)
        return Prompts(points / scale * side, labels)

    def _masks(self, batch: list[FramePrompt]) -> Prompts:
        masks = torch.from_numpy(np.stack([np.asarray(p.mask, dtype=np.float32) for p in batch]))[:, None]
        side = (self.tracker.image_size,) * 2
        if tuple(masks.shape[-2:]) != side:
            masks = F.interpolate(masks, side, mode="bilinear", align_corners=False, antialias=True)
        return Prompts(masks=(masks >= 0.5).to(self.tracker.device))

    # ---------------------------------------------------------------------------------------------- propagation

    def propagate(self, direction: Direction = "both") -> Iterator[FrameResult]:
        """Carry all objects over the frames, frame after frame in the order visited."""
        for frame in sorted(set[int]().union(*(track.fresh for track in self.tracks.values()))):
            self._settle(frame, 1)
        if direction != "backward":
            yield from self._forward(direction)
        if direction in ("backward", "both", "both_apart"):
            yield from self._backward(direction)

    def _forward(self, direction: Direction) -> Iterator[FrameResult]:
        tracks = list(self.tracks.values())
        starts = [0 if direction == "front_to_end" else track.first for track in tracks]
        horizon = self.policy.horizon
        for frame in range(min(starts), self.length):
            active = [track for track, start in zip(tracks, starts, strict=True) if start <= frame]
            result = self._visit(active, frame, reverse=False)
            if horizon is not None and not self.keep:
                for track in active:
                    held = track.bank.tracked.get(frame)
                    if held is not None and direction == "both" and frame - track.first <= horizon:
                        track.near[frame] = held  # SAM 2's backward pass attends to these across the prompted frame
                    track.bank.forget([frame - horizon])
            yield result

    def _backward(self, direction: Direction) -> Iterator[FrameResult]:
        tracks = list(self.tracks.values())
        horizon = self.policy.horizon
        starts = [max(track.prompted) if direction == "backward" else track.first - 1 for track in tracks]
        for track in tracks:
            if direction == "both_apart":
                track.bank = MemoryBank({t: track.bank.conditioning[t] for t in sorted(track.bank.conditioning)})
            elif horizon is not None and not self.keep:
                track.bank = MemoryBank(track.bank.conditioning, track.near)
            if track.first > 0 and track.first in track.seen:
                # the official predictor's backward pass begins on this frame: corrected, it looks at those after it
                track.seen[track.first] = track.seen[track.first][0], True
        for frame in range(max(starts), -1, -1):
            active = [track for track, start in zip(tracks, starts, strict=True) if start >= frame]
            result = self._visit(active, frame, reverse=True)
            if horizon is not None and not self.keep:
                for track in active:
                    track.bank.forget([frame + horizon])
            yield result

    def _visit(self, tracks: list[Track], frame: int, reverse: bool) -> FrameResult:
        """One frame for all objects: as prompted, or tracked from memory and memorised."""
        said = [track for track in tracks if frame in track.prompted]
        tracked = [track for track in tracks if frame not in track.prompted]
        found = [track.prompted[frame] for track in said]
        with self._predictor.context():
            if tracked:
                features = self.features.at(frame, len(tracked), -1 if reverse else 1)
                attended = [self._attend(track, features, frame, reverse) for track in tracked]
                conditioned = recall(self.tracker, features, attended)
                decoded = self.tracker.segment(features, MemoryBank(), frame, initial=False, conditioned=conditioned)
                self._remember(tracked, decoded, features, frame, conditioning=False)
                found.append(decoded)
            decoded = found[0] if len(found) == 1 else _join(found)
            if self.keep:
                for track, low in zip([*said, *tracked], decoded.logits.cpu().split(1), strict=True):
                    track.seen[frame] = low, reverse
            return self._result(frame, [*said, *tracked], decoded)

    def _attend(self, track: Track, features: Features, frame: int, reverse: bool) -> Attended:
        policy = self.policy
        image = features.embed[:1] if policy.looks_at_images else None
        return policy.attend(track.bank, frame, reverse, self.length, False, image)

    def _remember(
        self, tracks: list[Track], decoded: Decoded, features: Features, frame: int, conditioning: bool
    ) -> None:
        """The memory encoder, once for all objects; then each policy decision by object."""
        policy = self.policy
        memory = self.tracker.memorise(features, decoded, self._predictor.memory_dtype)
        pieces = zip(memory.features.split(1), memory.pointer.split(1), strict=True)
        for track, ious, (spatial, pointer) in zip(tracks, decoded.ious, pieces, strict=True):
            one = Memory(spatial, pointer)
            if policy.looks_at_images:  # each object keeps other frames: a view would hold the memories of all
                one = Memory(spatial.clone(), pointer.clone(), ious.max().reshape(1), features.embed[:1])
            policy.admit(track.bank, frame, one, conditioning)

    def _result(self, frame: int, tracks: list[Track], decoded: Decoded) -> FrameResult:
        logits = F.interpolate(decoded.logits.float(), self.size, mode="bilinear", align_corners=False)[:, 0]
        return FrameResult(frame, tuple(track.object for track in tracks), logits, decoded.object_score[:, 0])


def _rows(decoded: Decoded) -> list[Decoded]:
    """One an object, reduced to what is remembered of a prompted frame.

    As in the official predictor its memory is made from the low-resolution mask and binarised, also where the prompt
    was a mask: hence `from_points` and no `given_mask`.
    """
    low, ious = decoded.logits, decoded.ious.amax(1, keepdim=True)
    rows = [slice(i, i + 1) for i in range(len(low))]
    return [Decoded(low[r], ious[r], low[r], decoded.object_score[r], decoded.pointer[r], True) for r in rows]


def _join(parts: list[Decoded]) -> Decoded:
    low = torch.cat([part.logits for part in parts])
    return Decoded(
        all_logits=low,
        ious=torch.cat([part.ious.amax(1, keepdim=True) for part in parts]),
        logits=low,
        object_score=torch.cat([part.object_score for part in parts]),
        pointer=torch.cat([part.pointer for part in parts]),
        from_points=True,
    )
