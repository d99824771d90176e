"""Streaming predictor: from prompts on some frames of a volume or clip, it predicts masks on all frames.

It computes what `sam2.sam2_video_predictor.SAM2VideoPredictor` computes (Ravi et al. 2024, arXiv 2408.00714) with its
default post-processing except the filling of holes; tests compare the logits of both. Unlike that predictor, it encodes
frames in batches, runs all objects of a frame as one batch, needs no more memory for longer clips, and predicts each
object independently of the others.

Legend: N objects, T frames, C channels, H and W pixels of the given frames, S model input side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from medsam2.fast.execution import Part
from medsam2.inference.features import Direction, Frames
from medsam2.inference.session import FramePrompt, FrameResult, Session
from medsam2.model.memory_bank import MemoryPolicy
from medsam2.model.tracker import Tracker

__all__ = ["FramePrompt", "FrameResult", "Frames", "Prediction", "Predictor", "Session"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """Masks of all objects, on the CPU.

    Attributes:
        masks: bool [N, T, H, W]; empty on frames that the direction does not reach.
        scores: float32 [N, T], logit of "the object is in this frame"; NaN on frames not reached.
        logits: float32 [N, T, H, W] if requested, else None; -1024 on frames not reached and where absent.
        encoded: number of frames that the image encoder has encoded.
    """

    masks: Tensor
    scores: Tensor
    logits: Tensor | None
    encoded: int


class Predictor:
    """Segments whole volumes and clips with a `Tracker`.

    Args:
        tracker: used in eval mode; its mode is restored after each frame.
        batch_frames: number of frames per call of the image encoder.
        cache_frames: maximum number of frames whose features are cached (4 MB each at 512 px).
        memory_dtype: dtype of stored spatial memories; the official predictor uses bfloat16.
        autocast: run the network in this precision, or None for float32.
        policy: memory policy (`medsam2.model.policies.make_policy`); by default the policy of `tracker`.
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

    @contextmanager
    def context(self) -> Iterator[None]:
        """Set eval mode and disable gradients.

        Inference mode is not used, because training uses encodings that the network caches here.
        """
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
        """Predict the masks of every prompted object on every frame.

        Args:
            frames: uint8 [T, C, H, W], C = 1 or 3, or any object with `len()` and `[index]` that returns such frames
                (`medsam2.inference.frames` reads them from disk one by one).
            prompts: at least one for each object 0 to N - 1.
            direction: see `ProtocolSettings`.
            logits: also return the logits (4 bytes per pixel).

        Raises:
            ValueError: an object has no prompts, or a frame is out of range.
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
        """Predict like `predict`, but yield one result per visited frame; memory use does not grow with the clip."""
        objects = {prompt.object for prompt in prompts}
        if not objects or objects != set(range(len(objects))):
            raise ValueError(f"objects are numbered from 0 without gaps and each needs a prompt; got {sorted(objects)}")
        session = Session(self, frames, keep_history=False)
        try:
            session.prompt(prompts, -1 if direction == "backward" else 1)
            yield from session.propagate(direction)
        finally:
            self.encoded = session.features.encoded

    def session(self, frames: Frames) -> Session:
        """Start an interactive session on one clip: prompt, propagate, correct a tracked frame, propagate again."""
        return Session(self, frames)
