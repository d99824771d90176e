"""Efficient frame pruning (Liu et al. 2024, SurgSAM-2, arXiv 2408.07931): a full bank drops what repeats the newest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from medsam2.model.memory_bank import Attended, Memory, MemoryBank, MemoryPolicy, MemorySettings

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

NAME = "pruned"


@dataclass(frozen=True, kw_only=True)
class PrunedPolicy(MemoryPolicy):
    """SAM 2's memories but for the `drop` most similar to the newest, decided anew for every object and frame.

    Only when all slots were filled. The first memory and the newest always stay; pointers and storage are untouched.
    In training SAM 2's own rule holds.

    Attributes:
        encoding: [slots, M] or [slots, 1, 1, M] temporal encodings, which are part of what is compared: the network's
            own parameter, so that they stay right while it is trained or moved.
    """

    drop: int
    encoding: Tensor
    in_clips: ClassVar[bool] = False

    def attend(
        self,
        bank: MemoryBank,
        frame: int,
        reverse: bool,
        num_frames: int,
        training: bool,
        image: Tensor | None = None,
    ) -> Attended:
        attended = super().attend(bank, frame, reverse, num_frames, training)
        spatial = attended.spatial
        if training or len(spatial) < self.slots or self.drop == 0:
            return attended
        between = range(1, len(spatial) - 1)
        likeness = self._likeness(spatial)[1:-1].tolist()
        dropped = sorted(between, key=lambda place: -likeness[place - 1])[: self.drop]
        kept = tuple(pair for place, pair in enumerate(spatial) if place not in dropped)
        return Attended(kept, attended.pointers, attended.pointer_span)

    def _likeness(self, spatial: tuple[tuple[int | None, Memory], ...]) -> Tensor:
        """Sum over the image of the cosine similarity of each memory's tokens to the newest's: [E]."""
        if spatial[0][1].features.shape[0] != 1:
            raise ValueError("pruning decides for one object at a time: give each a memory bank of its own")
        tokens = torch.cat([memory.features for _, memory in spatial]).float().flatten(2)
        rows = self.encoding.detach().flatten(1)[[row for row, _ in spatial]]
        tokens = tokens + rows[..., None].to(tokens)
        return F.cosine_similarity(tokens, tokens[-1:], dim=1).sum(1)


def make(settings: MemorySettings, sam: SAM2Base) -> PrunedPolicy:
    return PrunedPolicy.for_network(sam, drop=settings.pruned_frames, encoding=sam.maskmem_tpos_enc)
