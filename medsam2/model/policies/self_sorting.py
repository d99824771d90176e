"""The confidence and self-sorting memory bank (Zhu et al. 2024, MedSAM-2, arXiv 2408.00874).

Sure and varied memories are kept wherever in the clip they come from, and a frame attends to a draw of them: without
temporal encodings or pointers, order and distance mean nothing, so that unordered images can be treated as a clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medsam2.model.memory import Attended, Memory, MemoryBank, Sam2Policy, sam2_policy
from medsam2.model.policies.settings import MemorySettings

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

NAME = "self_sorting"
IOU_SLACK = 0.1


@dataclass(frozen=True)
class SelfSortingPolicy:
    """At most `capacity` memories of an object: admitted by confidence, sorted by dissimilarity, drawn by likeness.

    Prompted frames are admitted whatever their predicted IoU, and compete for their place like the others. In training
    SAM 2's own rule holds.
    """

    base: Sam2Policy
    capacity: int
    confidence: float
    replace: Literal["dissimilarity", "nearest"]
    seed: int

    @property
    def horizon(self) -> None:
        return None

    @property
    def looks_at_images(self) -> bool:
        return True

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
        likeness = _likeness([*held.values(), memory])
        leaving = least_wanted(likeness, [_iou(m) for m in (*held.values(), memory)], self.replace)
        if frames[leaving] == frame:
            return
        bank.conditioning.pop(frames[leaving], None)
        bank.tracked.pop(frames[leaving], None)
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
            return self.base.attend(bank, frame, reverse, num_frames, training)
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


def least_wanted(likeness: np.ndarray, ious: Sequence[float], replace: Literal["dissimilarity", "nearest"]) -> int:
    """Which of a full bank's entries and the new one (the last) leaves.

    Args:
        likeness: cosine similarities [K + 1, K + 1]. ious: predicted, of each.
        replace: see `MemorySettings`.
    """
    new = len(likeness) - 1
    if replace == "dissimilarity":
        apart = (1 - likeness).sum(1) - (1 - likeness).diagonal()
        return int(apart.argmin())
    if new < 2:
        return new
    far = int(likeness[new, :new].argmin())
    others = likeness[far, :new].copy()
    others[far] = -np.inf
    near = int(others.argmax())
    better = likeness[new, far] < likeness[far, near] and ious[new] > ious[near] - IOU_SLACK
    return near if better else new


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


def _iou(memory: Memory) -> float:
    return 1.0 if memory.iou is None else float(memory.iou)


def make(settings: MemorySettings, sam: SAM2Base) -> SelfSortingPolicy:
    return SelfSortingPolicy(sam2_policy(sam), settings.capacity, settings.confidence, settings.replace, settings.seed)
