"""The one streaming predictor: prompts on some frames of a volume or clip in, masks on all frames out.

It computes what `sam2.sam2_video_predictor.SAM2VideoPredictor` computes (Ravi et al. 2024, arXiv 2408.00714) with its
default post-processing but for the filling of holes; tests hold the logits of both against each other. Unlike it,
frames are encoded in batches, all objects of a frame run as one batch, memory does not grow with the clip, and an
object's masks do not depend on which other objects are predicted beside it.

Legend: N objects, T frames, C channels, H and W pixels of the given frames, S model input side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from medsam2.evaluation.settings import Direction
from medsam2.fast.execution import Part, allow_shapes
from medsam2.inference.features import Frames
from medsam2.inference.session import FramePrompt, FrameResult, Session
from medsam2.model.memory_bank import MemoryPolicy
from medsam2.model.tracker import Tracker

__all__ = ["FramePrompt", "FrameResult", "Frames", "Prediction", "Predictor", "Session"]


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


class Predictor:
    """Segments whole volumes and clips with a `Tracker`.

    Args:
        tracker: used in eval mode; its mode is restored after each frame.
        batch_frames: frames in one call of the image encoder.
        cache_frames: at most so many frames' features are held (4 MB each at 512 px).
        memory_dtype: how spatial memories are stored; bfloat16 is what the official predictor does.
        autocast: run the network in this precision, or None for float32.
        policy: of the memory bank (`medsam2.model.policies.make_policy`); the tracker's own by default.
        compile: parts of the network run through torch.compile: minutes at the start, then faster frames.
    """

    def __init__(
        self,
        tracker: Tracker,
        batch_frames: int = 8,
        cache_frames: int = 64,
        memory_dtype: torch.dtype = torch.bfloat16,
        autocast: torch.dtype | None = None,
        policy: MemoryPolicy | None = None,
        compile: tuple[Part, ...] = (),
    ) -> None:
        self.tracker, self.policy, self.encoded = tracker, policy or tracker.policy, 0
        self.batch_frames, self.cache_frames = batch_frames, cache_frames
        self.memory_dtype, self.autocast = memory_dtype, autocast
        self._speed = tracker.speed.model_copy(update={"compile": compile}) if compile else None
        if compile:
            allow_shapes()

    @contextmanager
    def context(self) -> Iterator[None]:
        """Eval mode, no gradients (not inference mode: the network caches encodings that training uses too)."""
        tracker, training, speed = self.tracker, self.tracker.training, self.tracker.speed
        casting = nullcontext() if self.autocast is None else torch.autocast(tracker.device.type, self.autocast)
        if training:
            tracker.eval()
        tracker.speed = self._speed or speed
        try:
            with torch.no_grad(), casting:
                yield
        finally:
            tracker.speed = speed
            if training:
                tracker.train()

    def predict(
        self, frames: Frames, prompts: Sequence[FramePrompt], direction: Direction = "both", logits: bool = False
    ) -> Prediction:
        """Masks of every prompted object on every frame.

        Args:
            frames: uint8 [T, C, H, W], C = 1 or 3, or anything with `len()` and `[index]` giving such frames
                (`medsam2.inference.frames` reads them from disk one by one).
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
        objects = {prompt.object for prompt in prompts}
        if not objects or objects != set(range(len(objects))):
            raise ValueError(
                f"objects are numbered from 0 without gaps and each needs a prompt; found {sorted(objects)}"
            )
        session = Session(self, frames, keep=False)
        try:
            session.prompt(prompts, -1 if direction == "backward" else 1)
            yield from session.propagate(direction)
        finally:
            self.encoded = session.features.encoded

    def session(self, frames: Frames) -> Session:
        """Interactive work on one clip: prompt, propagate, correct a tracked frame, propagate again."""
        return Session(self, frames)
