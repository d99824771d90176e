"""The confidence and self-sorting memory bank (Zhu et al. 2024, MedSAM-2, arXiv 2408.00874).

The bank stores confident and dissimilar memories from anywhere in the clip, and a frame attends to a random sample of
them. There are no temporal encodings or pointers, so that unordered images can be treated as a clip.
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
    """Stores up to `capacity` memories per object by confidence and dissimilarity; samples them by similarity.

    Prompted frames are admitted whatever their predicted IoU, but later memories may replace them. In training it
    follows SAM 2's rule.
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
            raise ValueError("self-sorting needs the memory of one object, with its predicted IoU")
        if not conditioning and float(memory.iou) < self.confidence:
            return
        stored = {**bank.conditioning, **bank.tracked}
        stored.pop(frame, None)
        if len(stored) >= self.capacity:
            frames = [*stored, frame]
            distances = 1 - _similarities([*stored.values(), memory])
            replaced = frames[int((distances.sum(1) - distances.diagonal()).argmin())]  # the most similar to the others
            if replaced == frame:
                return
            bank.conditioning.pop(replaced, None)
            bank.tracked.pop(replaced, None)
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
        stored = {**bank.conditioning, **bank.tracked}
        memories = [stored[t] for t in sorted(stored)]  # by frame, so that samples do not depend on insertion order
        if image is None or any(memory.image is None for memory in memories):
            raise ValueError("self-sorting compares frames; it needs their embeddings, also of the stored memories")
        images = torch.cat([memory.image.float().flatten(1) for memory in memories if memory.image is not None])
        similarities = F.cosine_similarity(images, image.float().flatten(1), dim=1).cpu().numpy()
        indices = sample_indices(similarities, self.capacity, (self.seed, frame, int(reverse)))
        return Attended(tuple((None, memories[index]) for index in indices), (), 1)


def sample_indices(similarities: np.ndarray, count: int, seed: tuple[int, ...]) -> list[int]:
    """Sample `count` indices with replacement, with probabilities softmax(`similarities`); `seed` determines them."""
    weights = np.exp(similarities.astype(np.float64) - similarities.max())
    edges = np.cumsum(weights / weights.sum())
    indices = np.searchsorted(edges, np.random.default_rng(seed).random(count), side="right")
    return [min(int(index), len(similarities) - 1) for index in indices]


def _similarities(memories: Sequence[Memory]) -> np.ndarray:
    """Return the cosine similarity of every pair of memories, [E, E]."""
    flat = torch.cat([memory.features for memory in memories]).float().flatten(1)
    flat = F.normalize(flat, dim=1)
    similarities: np.ndarray = (flat @ flat.T).cpu().numpy()
    return similarities


def make(settings: MemorySettings, sam: SAM2Base) -> SelfSortingPolicy:
    return SelfSortingPolicy.for_network(
        sam, capacity=settings.capacity, confidence=settings.confidence, seed=settings.seed
    )
