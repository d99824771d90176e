"""The one streaming predictor: prompts on some frames of a volume or clip in, masks on all frames out.

It computes what `sam2.sam2_video_predictor.SAM2VideoPredictor` computes (Ravi et al. 2024, arXiv 2408.00714) with its
default post-processing but for the filling of holes; tests hold the logits of both against each other. Unlike it,
frames are encoded in batches, objects with the same prompted frames run as one batch, memory does not grow with the
clip, and an object's masks do not depend on which other objects are predicted beside it.

Legend: N objects, T frames, C channels, H and W pixels of the given frames, S model input side, h = w = S / 16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medsam2.evaluation.features import FrameFeatures, Frames
from medsam2.evaluation.settings import Direction
from medsam2.model.memory import Memory, MemoryBank
from medsam2.model.tracker import Decoded, Features, Tracker
from medsam2.prompts.kinds import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, Prompts


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


@dataclass(frozen=True, eq=False)
class Prediction:
    """Masks of all objects, on the CPU.

    Attributes:
        masks: bool [N, T, H, W]; empty on frames that the direction does not reach.
        scores: float32 [N, T], logit of "the object is here"; NaN on frames not reached.
        logits: float32 [N, T, H, W] if asked for, else None; -1024 where not reached or absent.
        encoded: number of frames that went through the image encoder.
    """

    masks: Tensor
    scores: Tensor
    logits: Tensor | None
    encoded: int


@dataclass
class _Group:
    """Objects that were prompted on the same frames, and so share one memory bank."""

    objects: tuple[int, ...]
    prompted: dict[int, Decoded]
    bank: MemoryBank
    near: dict[int, Memory] = field(default_factory=dict)

    @property
    def first(self) -> int:
        return min(self.prompted)

    @property
    def last(self) -> int:
        return max(self.prompted)


class Predictor:
    """Segments whole volumes and clips with a `Tracker`.

    Args:
        tracker: used in eval mode; its mode is restored afterwards.
        batch_frames: frames in one call of the image encoder.
        cache_frames: at most so many frames' features are held (4 MB each at 512 px).
        memory_dtype: how spatial memories are stored; bfloat16 is what the official predictor does.
        autocast: run the network in this precision, or None for float32.
    """

    def __init__(
        self,
        tracker: Tracker,
        batch_frames: int = 8,
        cache_frames: int = 64,
        memory_dtype: torch.dtype = torch.bfloat16,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.tracker, self.memory_dtype, self.autocast = tracker, memory_dtype, autocast
        self.batch_frames, self.cache_frames = batch_frames, cache_frames
        self.encoded = 0

    def predict(
        self, frames: Frames, prompts: Sequence[FramePrompt], direction: Direction = "both", logits: bool = False
    ) -> Prediction:
        """Masks of every prompted object on every frame.

        Args:
            frames: uint8 [T, C, H, W], C = 1 or 3, or anything with `len()` and `[index]` giving such frames.
            prompts: at least one for each object 0 to N - 1.
            direction: see `ProtocolSettings`.
            logits: also return the logits (4 bytes a pixel).

        Raises:
            ValueError: an object without prompts, or a frame out of range.
        """
        height, width = frames[0].shape[-2:]
        count = 1 + max((p.object for p in prompts), default=-1)
        masks = torch.zeros(count, len(frames), height, width, dtype=torch.bool)
        scores = torch.full((count, len(frames)), float("nan"))
        values = torch.full(masks.shape, -1024.0) if logits else None
        for result in self.stream(frames, prompts, direction):
            rows = torch.tensor(result.objects)
            masks[rows, result.frame] = (result.logits > 0).cpu()
            scores[rows, result.frame] = result.scores.float().cpu()
            if values is not None:
                values[rows, result.frame] = result.logits.cpu()
        return Prediction(masks, scores, values, self.encoded)

    def stream(
        self, frames: Frames, prompts: Sequence[FramePrompt], direction: Direction = "both"
    ) -> Iterator[FrameResult]:
        """Like `predict`, but yields frame after frame in the order visited; memory does not grow with the clip."""
        rounds = _check(prompts, len(frames))
        features = FrameFeatures(self.tracker, frames, self.batch_frames, self.cache_frames, self._context)
        size = tuple(frames[0].shape[-2:])
        training = self.tracker.training
        self.tracker.eval()
        try:
            groups = self._prompt(rounds, features, size, -1 if direction == "backward" else 1)
            if direction != "backward":
                yield from self._forward(groups, features, size, len(frames), direction)
            if direction in ("backward", "both", "both_apart"):
                yield from self._backward(groups, features, size, len(frames), direction)
        finally:
            self.encoded = features.encoded
            self.tracker.train(training)

    # ------------------------------------------------------------------------------------------ prompted frames

    def _prompt(
        self, rounds: dict[int, dict[int, list[FramePrompt]]], features: FrameFeatures, size: tuple[int, ...], step: int
    ) -> list[_Group]:
        """Decode every prompted frame without memory, and memorise it: the groups with their conditioning frames."""
        together: dict[tuple[int, ...], list[int]] = {}
        for index in sorted({index for on_frame in rounds.values() for index in on_frame}):
            together.setdefault(tuple(sorted(f for f in rounds if index in rounds[f])), []).append(index)
        groups = [_Group(tuple(objects), {}, MemoryBank()) for objects in together.values()]
        for frame in sorted(rounds, reverse=step < 0):
            decoded = self._decode_prompted(rounds[frame], features.at(frame, 1, step), size)
            for group in groups:
                if group.objects[0] not in decoded:
                    continue
                joined = _join([decoded[index] for index in group.objects])
                with self._context():
                    memory = self.tracker.memorise(
                        features.at(frame, len(group.objects), step), joined, self.memory_dtype
                    )
                group.prompted[frame] = joined
                group.bank.add(frame, memory, conditioning=True)
        return groups

    def _decode_prompted(
        self, prompts: dict[int, list[FramePrompt]], features: Features, size: tuple[int, ...]
    ) -> dict[int, Decoded]:
        """Decode one frame's prompts, round by round; objects with as many points each are one batch."""
        said: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        decoded: dict[int, Decoded] = {}
        for turn in range(max(len(rounds) for rounds in prompts.values())):
            batches: dict[tuple[int, bool], list[FramePrompt]] = {}
            for index, rounds in prompts.items():
                if turn >= len(rounds):
                    continue
                prompt = rounds[turn]
                said[index] = _extend(None if prompt.mask is not None else said.get(index), prompt)
                batches.setdefault((len(said[index][0]), index in decoded), []).append(prompt)
            for (points, corrects), batch in batches.items():
                objects = [prompt.object for prompt in batch]
                given = self._masks(batch) if points == 0 else self._points([said[i] for i in objects], size)
                previous = torch.cat([decoded[i].logits for i in objects]) if corrects and points else None
                with self._context():
                    zeros = torch.zeros(len(batch), dtype=torch.int64, device=features.embed.device)
                    result = self.tracker.segment(
                        features.select(zeros), MemoryBank(), batch[0].frame, given, previous, initial=True
                    )
                decoded.update(zip(objects, _split(result), strict=True))
        return decoded

    def _points(self, said: list[tuple[np.ndarray, np.ndarray]], size: tuple[int, ...]) -> Prompts:
        points = torch.from_numpy(np.stack([points for points, _ in said])).to(self.tracker.device)
        labels = torch.from_numpy(np.stack([labels for _, labels in said])).to(self.tracker.device)
        scale = torch.tensor([size[1], size[0]], dtype=torch.float32, device=self.tracker.device)
        return Prompts(points / scale * self.tracker.image_size, labels)

    def _masks(self, batch: list[FramePrompt]) -> Prompts:
        masks = torch.from_numpy(np.stack([np.asarray(p.mask, dtype=np.float32) for p in batch]))[:, None]
        side = (self.tracker.image_size,) * 2
        if tuple(masks.shape[-2:]) != side:
            masks = F.interpolate(masks, side, mode="bilinear", align_corners=False, antialias=True)
        return Prompts(masks=(masks >= 0.5).to(self.tracker.device))

    # ---------------------------------------------------------------------------------------------- propagation

    def _forward(
        self, groups: list[_Group], features: FrameFeatures, size: tuple[int, ...], length: int, direction: Direction
    ) -> Iterator[FrameResult]:
        starts = [0 if direction == "front_to_end" else group.first for group in groups]
        horizon = self.tracker.policy.horizon
        for frame in range(min(starts), length):
            active = [group for group, start in zip(groups, starts, strict=True) if start <= frame]
            results = []
            for group in active:
                decoded, memory = self._visit(group, group.bank, features, frame, length, reverse=False)
                results.append(decoded)
                if memory is not None and direction == "both" and frame - group.first <= horizon:
                    group.near[frame] = memory  # SAM 2's reverse pass attends to these across the prompted frame
                group.bank.forget([frame - horizon])
            yield self._result(frame, active, results, size)

    def _backward(
        self, groups: list[_Group], features: FrameFeatures, size: tuple[int, ...], length: int, direction: Direction
    ) -> Iterator[FrameResult]:
        alone = direction == "backward"
        starts = [group.last if alone else group.first - 1 for group in groups]
        banks = [MemoryBank(dict(group.bank.conditioning), dict(group.near)) for group in groups]
        horizon = self.tracker.policy.horizon
        for frame in range(max(starts), -1, -1):
            active = [i for i, start in enumerate(starts) if start >= frame]
            results = []
            for i in active:
                decoded, _ = self._visit(groups[i], banks[i], features, frame, length, reverse=True)
                results.append(decoded)
                banks[i].forget([frame + horizon])
            yield self._result(frame, [groups[i] for i in active], results, size)

    def _visit(
        self, group: _Group, bank: MemoryBank, features: FrameFeatures, frame: int, length: int, reverse: bool
    ) -> tuple[Decoded, Memory | None]:
        """One frame for one group: as prompted, or tracked from memory and memorised."""
        if frame in group.prompted:
            return group.prompted[frame], None
        seen = features.at(frame, len(group.objects), -1 if reverse else 1)
        with self._context():
            decoded = self.tracker.segment(seen, bank, frame, reverse=reverse, num_frames=length)
            memory = self.tracker.memorise(seen, decoded, self.memory_dtype)
        bank.add(frame, memory, conditioning=False)
        return decoded, memory

    def _result(self, frame: int, groups: list[_Group], decoded: list[Decoded], size: tuple[int, ...]) -> FrameResult:
        low = torch.cat([d.logits for d in decoded]).float()
        logits = F.interpolate(low, size, mode="bilinear", align_corners=False)[:, 0]
        scores = torch.cat([d.object_score for d in decoded])[:, 0]
        return FrameResult(frame, tuple(i for group in groups for i in group.objects), logits, scores)

    def _context(self) -> AbstractContextManager:
        """No gradients (not inference mode: the network caches encodings that training uses too), and autocast."""
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        if self.autocast is not None:
            stack.enter_context(torch.autocast(self.tracker.device.type, self.autocast))
        return stack


def _check(prompts: Sequence[FramePrompt], length: int) -> dict[int, dict[int, list[FramePrompt]]]:
    """Prompts by frame and object, in the order given."""
    rounds: dict[int, dict[int, list[FramePrompt]]] = {}
    for prompt in prompts:
        if not 0 <= prompt.frame < length:
            raise ValueError(f"a prompt is on frame {prompt.frame}, but the frames are 0 to {length - 1}")
        rounds.setdefault(prompt.frame, {}).setdefault(prompt.object, []).append(prompt)
    objects = {prompt.object for prompt in prompts}
    if not objects or objects != set(range(max(objects) + 1)):
        raise ValueError(f"objects are numbered from 0 without gaps and each needs a prompt; found {sorted(objects)}")
    return rounds


def _extend(before: tuple[np.ndarray, np.ndarray] | None, prompt: FramePrompt) -> tuple[np.ndarray, np.ndarray]:
    """All points said so far about an object on a frame."""
    points, labels = prompt.as_points()
    if before is None:
        return points, labels
    return np.concatenate([before[0], points]), np.concatenate([before[1], labels])


def _split(decoded: Decoded) -> list[Decoded]:
    """One a object, reduced to what is remembered of a prompted frame.

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
        ious=torch.cat([part.ious for part in parts]),
        logits=low,
        object_score=torch.cat([part.object_score for part in parts]),
        pointer=torch.cat([part.pointer for part in parts]),
        from_points=True,
    )
