"""Track objects through one clip: decode prompts, propagate, accept corrections, propagate again.

Each object has a separate memory bank. The network runs once per frame for all objects that are tracked there, even
if they were prompted on different frames.

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

from medsam2.fast.attention import attend_separate_banks
from medsam2.inference.features import Direction, FrameFeatures, Frames
from medsam2.model.memory_bank import Attended, Memory, MemoryBank
from medsam2.model.tracker import Decoded, Features
from medsam2.prompts.kinds import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, Prompts

if TYPE_CHECKING:
    from medsam2.inference.predictor import Predictor


@dataclass(frozen=True, eq=False)
class FramePrompt:
    """A user's prompt for one object on one frame: either a box and/or points, or a mask.

    Several prompts for the same frame and object are successive rounds of correction: points accumulate, and each
    round receives the mask of the previous round.

    Attributes:
        frame: index in the clip. object: 0 to N - 1.
        box: (x0, y0, x1, y1) in pixels of the given frames.
        points: float [P, 2], (x, y) in pixels of the given frames. labels: int [P], 1 on the object, 0 off it.
        mask: bool [H, W], used as the output of the frame.

    Raises:
        ValueError: the prompt has neither or both of a mask and a box or points, or points without labels.
    """

    frame: int
    object: int
    box: tuple[float, float, float, float] | None = None
    points: np.ndarray | None = None
    labels: np.ndarray | None = None
    mask: np.ndarray | None = None

    def __post_init__(self) -> None:
        has_points = self.box is not None or self.points is not None
        if has_points == (self.mask is not None):
            raise ValueError("a prompt is either a box and/or points, or a mask")
        if (self.points is None) != (self.labels is None):
            raise ValueError("a prompt needs points and labels together")

    def as_points(self) -> tuple[np.ndarray, np.ndarray]:
        """Return points float32 [P, 2] and labels int32 [P]; a box comes first, as its two corners."""
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
    """Masks of one visited frame: its objects, their logits [n, H, W] and object scores [n] (logits)."""

    frame: int
    objects: tuple[int, ...]
    logits: Tensor
    scores: Tensor


@dataclass
class Track:
    """State of one object: its prompts, the decoder's outputs for them, and its memory.

    Attributes:
        inputs: points and labels by prompted frame. prompted: the decoder's output by prompted frame.
        pending: prompted frames whose memory is not encoded yet.
        overlap: memories of the forward pass that the backward pass attends to across the prompted frame.
        visited: by frame, its logits [1, 1, 4h, 4w] and whether it was visited backward; empty unless
            `Session.keep_history`.
    """

    object: int
    inputs: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    prompted: dict[int, Decoded] = field(default_factory=dict)
    pending: set[int] = field(default_factory=set)
    bank: MemoryBank = field(default_factory=MemoryBank)
    overlap: dict[int, Memory] = field(default_factory=dict)
    visited: dict[int, tuple[Tensor, bool]] = field(default_factory=dict)

    @property
    def first(self) -> int:
        return min(self.prompted)


class Session:
    """Interactive segmentation of one clip.

    Call `prompt` again after `propagate` to correct a tracked frame: the decoder then receives the memory and the mask
    of that frame, and the corrected frame guides the next propagation like the frames that were prompted first (the
    official predictor with `add_all_frames_to_correct_as_cond`). New objects may be added at any time.

    Args:
        predictor: runs the network. frames: see `Predictor.predict`.
        keep_history: keep memories and masks of all frames, so that frames can be corrected later: 0.2 MB per object
            and frame at 512 px. Otherwise memory use does not depend on the number of frames.
    """

    def __init__(self, predictor: Predictor, frames: Frames, keep_history: bool = True) -> None:
        self._predictor, self.keep_history = predictor, keep_history
        self.tracker, self.policy = predictor.tracker, predictor.policy
        self.size = tuple(frames[0].shape[-2:])
        self.length = len(frames)
        self.features = FrameFeatures(self.tracker, frames, predictor.batch_frames, predictor.cache_frames)
        self.tracks: dict[int, Track] = {}

    # ------------------------------------------------------------------------------------------ prompted frames

    def prompt(self, prompts: Sequence[FramePrompt], step: int = 1) -> list[FrameResult]:
        """Decode every prompted frame and return its masks, frame by frame.

        Args:
            step: +1 or -1, the direction in which the image encoder reads ahead.

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
                for track, output in zip(tracks, _split_objects(decoded), strict=True):
                    track.prompted[frame] = output
                    track.pending.add(frame)
                if not self.keep_history:
                    self._encode_pending_memory(frame, step)
                results.append(self._result(frame, tracks, decoded))
        return results

    def _decode(self, prompts: dict[int, list[FramePrompt]], tracks: list[Track], frame: int, step: int) -> Decoded:
        """Decode one frame's prompts, round by round; objects with the same number of points form one batch."""
        decoded: dict[int, Decoded] = {}
        for turn in range(max(len(rounds) for rounds in prompts.values())):
            batches: dict[tuple[int, bool, bool], list[Track]] = {}
            for track in tracks:
                if turn < len(prompts[track.object]):
                    num_points = self._append_prompt(track, prompts[track.object][turn])
                    corrects = track.object in decoded or frame in track.prompted or frame in track.visited
                    batches.setdefault((num_points, corrects, frame in track.visited), []).append(track)
            for (num_points, corrects, tracked), batch in batches.items():
                masks = [prompts[track.object][turn] for track in batch]
                model_prompts = self._point_prompts(batch, frame) if num_points else self._mask_prompts(masks)
                previous = None
                if corrects and num_points:
                    outputs = [decoded.get(track.object, track.prompted.get(frame)) for track in batch]
                    rows = [
                        output.logits if output is not None else track.visited[frame][0]
                        for track, output in zip(batch, outputs, strict=True)
                    ]
                    previous = torch.cat([row.to(self.tracker.device) for row in rows])
                features = self.features.at(frame, len(batch), step)
                result = self.tracker.segment(
                    features,
                    MemoryBank(),
                    frame,
                    model_prompts,
                    previous,
                    initial=not tracked,
                    conditioned=self._recondition(batch, features, frame) if tracked and num_points else None,
                )
                decoded.update(zip([track.object for track in batch], _split_objects(result), strict=True))
        return _join_objects([decoded[track.object] for track in tracks])

    def _encode_pending_memory(self, frame: int, step: int) -> None:
        """Encode the memory of a prompted frame; as in the official predictor, no frame attends to it earlier."""
        tracks = [track for track in self.tracks.values() if frame in track.pending]
        if tracks:
            decoded = _join_objects([track.prompted[frame] for track in tracks])
            with self._predictor.context():
                features = self.features.at(frame, len(tracks), step)
                self._encode_memory(tracks, decoded, features, frame, conditioning=True)
        for track in tracks:
            track.pending.remove(frame)

    def _append_prompt(self, track: Track, prompt: FramePrompt) -> int:
        """Add a prompt to an object's inputs; return the number of points on that frame, 0 for a mask."""
        points, labels = prompt.as_points()
        earlier = track.inputs.get(prompt.frame)
        if earlier is not None and prompt.mask is None and prompt.box is None:  # a box or a mask replaces all points
            points, labels = np.concatenate([earlier[0], points]), np.concatenate([earlier[1], labels])
        track.inputs[prompt.frame] = points, labels
        return len(points)

    def _recondition(self, tracks: list[Track], features: Features, frame: int) -> Tensor:
        """Condition the features of a tracked frame on memory again, in the direction in which it was tracked."""
        attended = [[self._attend(track, features, frame, track.visited[frame][1])] for track in tracks]
        return torch.cat([attend_separate_banks(self.tracker, features, memories) for memories in attended])

    def _point_prompts(self, tracks: list[Track], frame: int) -> Prompts:
        device, side = self.tracker.device, self.tracker.image_size
        points = torch.from_numpy(np.stack([track.inputs[frame][0] for track in tracks])).to(device)
        labels = torch.from_numpy(np.stack([track.inputs[frame][1] for track in tracks])).to(device)
        scale = torch.tensor([self.size[1], self.size[0]], dtype=torch.float32, device=device)
        return Prompts(points / scale * side, labels)

    def _mask_prompts(self, batch: list[FramePrompt]) -> Prompts:
        masks = torch.from_numpy(np.stack([np.asarray(prompt.mask, dtype=np.float32) for prompt in batch]))[:, None]
        side = (self.tracker.image_size,) * 2
        if tuple(masks.shape[-2:]) != side:
            masks = F.interpolate(masks, side, mode="bilinear", align_corners=False, antialias=True)
        return Prompts(masks=(masks >= 0.5).to(self.tracker.device))

    # ---------------------------------------------------------------------------------------------- propagation

    def propagate(self, direction: Direction = "both") -> Iterator[FrameResult]:
        """Track all objects through the clip; yield one result per frame, in the order in which frames are visited."""
        for frame in sorted(set[int]().union(*(track.pending for track in self.tracks.values()))):
            self._encode_pending_memory(frame, 1)
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
            if horizon is not None and not self.keep_history:
                for track in active:
                    memory = track.bank.tracked.get(frame)
                    if memory is not None and direction == "both" and frame - track.first <= horizon:
                        track.overlap[frame] = memory
                    track.bank.forget(frame - horizon)
            yield result

    def _backward(self, direction: Direction) -> Iterator[FrameResult]:
        tracks = list(self.tracks.values())
        horizon = self.policy.horizon
        starts = [max(track.prompted) if direction == "backward" else track.first - 1 for track in tracks]
        for track in tracks:
            if direction == "both_apart":
                track.bank = MemoryBank({t: track.bank.conditioning[t] for t in sorted(track.bank.conditioning)})
            elif horizon is not None and not self.keep_history:
                track.bank = MemoryBank(track.bank.conditioning, track.overlap)
            if track.first > 0 and track.first in track.visited:
                # The official predictor's backward pass starts on this frame, so a later correction of it attends
                # to the frames after it.
                track.visited[track.first] = track.visited[track.first][0], True
        for frame in range(max(starts), -1, -1):
            active = [track for track, start in zip(tracks, starts, strict=True) if start >= frame]
            result = self._visit(active, frame, reverse=True)
            if horizon is not None and not self.keep_history:
                for track in active:
                    track.bank.forget(frame + horizon)
            yield result

    def _visit(self, tracks: list[Track], frame: int, reverse: bool) -> FrameResult:
        """Return one frame's masks of all objects: the decoded prompts, or masks tracked from memory."""
        prompted = [track for track in tracks if frame in track.prompted]
        tracked = [track for track in tracks if frame not in track.prompted]
        outputs = [track.prompted[frame] for track in prompted]
        with self._predictor.context():
            if tracked:
                features = self.features.at(frame, len(tracked), -1 if reverse else 1)
                attended = [self._attend(track, features, frame, reverse) for track in tracked]
                conditioned = attend_separate_banks(self.tracker, features, attended)
                decoded = self.tracker.segment(features, MemoryBank(), frame, initial=False, conditioned=conditioned)
                self._encode_memory(tracked, decoded, features, frame, conditioning=False)
                outputs.append(decoded)
            decoded = outputs[0] if len(outputs) == 1 else _join_objects(outputs)
            if self.keep_history:
                for track, logits in zip([*prompted, *tracked], decoded.logits.cpu().split(1), strict=True):
                    track.visited[frame] = logits, reverse
            return self._result(frame, [*prompted, *tracked], decoded)

    def _attend(self, track: Track, features: Features, frame: int, reverse: bool) -> Attended:
        policy = self.policy
        image = features.embed[:1] if policy.looks_at_images else None
        return policy.attend(track.bank, frame, reverse, self.length, False, image)

    def _encode_memory(
        self, tracks: list[Track], decoded: Decoded, features: Features, frame: int, conditioning: bool
    ) -> None:
        """Run the memory encoder once for all objects, then let the policy decide for each object."""
        policy = self.policy
        memory = self.tracker.memorise(features, decoded, self._predictor.memory_dtype)
        rows = zip(memory.features.split(1), memory.pointer.split(1), strict=True)
        for track, ious, (spatial, pointer) in zip(tracks, decoded.ious, rows, strict=True):
            object_memory = Memory(spatial, pointer)
            if policy.looks_at_images:
                # Objects keep different frames: a view would keep the memories of all objects alive.
                object_memory = Memory(spatial.clone(), pointer.clone(), ious.max().reshape(1), features.embed[:1])
            policy.admit(track.bank, frame, object_memory, conditioning)

    def _result(self, frame: int, tracks: list[Track], decoded: Decoded) -> FrameResult:
        logits = F.interpolate(decoded.logits.float(), self.size, mode="bilinear", align_corners=False)[:, 0]
        return FrameResult(frame, tuple(track.object for track in tracks), logits, decoded.object_score[:, 0])


def _split_objects(decoded: Decoded) -> list[Decoded]:
    """Split the output of a prompted frame into one per object, with only the fields that later frames need.

    As in the official predictor, the memory of a prompted frame is encoded from its binarised low-resolution mask,
    even for a mask prompt; therefore `from_points` is True and there is no `given_mask`.
    """
    logits, ious = decoded.logits, decoded.ious.amax(1, keepdim=True)
    rows = [slice(i, i + 1) for i in range(len(logits))]
    return [Decoded(logits[r], ious[r], logits[r], decoded.object_score[r], decoded.pointer[r], True) for r in rows]


def _join_objects(parts: list[Decoded]) -> Decoded:
    logits = torch.cat([part.logits for part in parts])
    return Decoded(
        all_logits=logits,
        ious=torch.cat([part.ious.amax(1, keepdim=True) for part in parts]),
        logits=logits,
        object_score=torch.cat([part.object_score for part in parts]),
        pointer=torch.cat([part.pointer for part in parts]),
        from_points=True,
    )
