"""The confidence and self-sorting memory bank (Zhu et al. 2024, MedSAM-2, arXiv 2408.00874).

Sure and varied memories are kept wherever in the clip they come from, and a frame attends to a draw of them: without
temporal encodings or pointers, order and distance mean nothing, so that unordered images can be treated as a clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medsam2.model.memory_bank import Attended, Memory, MemoryBank, MemoryPolicy, MemorySettings

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

NAME = "self_sorting"


@dataclass(frozen=True, kw_only=True)
class SelfSortingPolicy(MemoryPolicy):
    """At most `capacity` memories of an object: admitted by confidence, sorted by dissimilarity, drawn by likeness.

    Prompted frames are admitted whatever their predicted IoU, and compete for their place like the others. In training
    SAM 2's own rule holds.
    """

    capacity: int
    confidence: float
    seed: int
    looks_at_images: ClassVar[bool] = True
    in_clips: ClassVar[bool] = False

    @property
    def horizon(self) -> None:
        return None

    def admit(self, bank: MemoryBank, frame: int, memory: Memory, conditioning: bool) -> None:
        if memory.features.shape[0] != 1 or memory.iou is None:
            raise ValueError("self-sorting decides for one object at a time and needs its predicted IoU")
        if not conditioning and float(memory.iou) < self.confidence:
            return
        held = {**bank.conditioning, **bank.tracked}
        held.pop(frame, None)
        if len(held) < self.capacity:
            bank.add(frame, memory, conditioning)
            return
        frames = [*held, frame]
        apart = 1 - _likeness([*held.values(), memory])
        leaving = frames[int((apart.sum(1) - apart.diagonal()).argmin())]  # the one most similar to the others
        if leaving == frame:
            return
        bank.conditioning.pop(leaving, None)
        bank.tracked.pop(leaving, None)
        bank.add(frame, memory, conditioning)

    def attend(
        self,
        bank: MemoryBank,
        frame: int,
        reverse: bool,
        num_frames: int,
        training: bool,
        image: Tensor | None = None,
    ) -> Attended:
        if training:
            return super().attend(bank, frame, reverse, num_frames, training)
        held = {**bank.conditioning, **bank.tracked}
        entries = [held[t] for t in sorted(held)]  # by frame, so that a draw does not depend on the order of admission
        if image is None or any(memory.image is None for memory in entries):
            raise ValueError("self-sorting compares frames: it needs the embedding of this one and of those remembered")
        stored = torch.cat([memory.image.float().flatten(1) for memory in entries if memory.image is not None])
        alike = F.cosine_similarity(stored, image.float().flatten(1), dim=1).cpu().numpy()
        spatial = tuple(
            (None, entries[place]) for place in draw(alike, self.capacity, (self.seed, frame, int(reverse)))
        )
        return Attended(spatial, (), 1)


def draw(alike: np.ndarray, count: int, seed: tuple[int, ...]) -> list[int]:
    """`count` places with replacement, in proportion to the exponential of `alike`; the same for the same seed."""
    weight = np.exp(alike.astype(np.float64) - alike.max())
    edges = np.cumsum(weight / weight.sum())
    places = np.searchsorted(edges, np.random.default_rng(seed).random(count), side="right")
    return [min(int(place), len(alike) - 1) for place in places]


def _likeness(memories: Sequence[Memory]) -> np.ndarray:
    flat = torch.cat([memory.features for memory in memories]).float().flatten(1)
    flat = F.normalize(flat, dim=1)
    similarities: np.ndarray = (flat @ flat.T).cpu().numpy()
    return similarities


def make(settings: MemorySettings, sam: SAM2Base) -> SelfSortingPolicy:
    return SelfSortingPolicy.for_network(
        sam, capacity=settings.capacity, confidence=settings.confidence, seed=settings.seed
    )
