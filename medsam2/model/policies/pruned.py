"""Efficient frame pruning (Liu et al. 2024, SurgSAM-2, arXiv 2408.07931): ignore memories similar to the newest."""

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
    """SAM 2's rule without the `drop` memories that are most similar to the newest, per object and frame.

    It prunes only when all slots are filled, and never the first or the newest memory; pointers and stored memories
    stay unchanged. In training it follows SAM 2's rule.

    Attributes:
        encoding: [slots, M] or [slots, 1, 1, M] temporal encodings, added to memories before they are compared. It is
            the network's parameter itself, so that it follows training and moves to another device.
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
        candidates = range(1, len(spatial) - 1)
        similarity = self._similarity(spatial).tolist()
        dropped = sorted(candidates, key=lambda index: -similarity[index])[: self.drop]
        remaining = tuple(pair for index, pair in enumerate(spatial) if index not in dropped)
        return Attended(remaining, attended.pointers, attended.pointer_span)

    def _similarity(self, spatial: tuple[tuple[int | None, Memory], ...]) -> Tensor:
        """Return the cosine similarity of each memory's tokens to the newest memory's, summed over the image, [E]."""
        if spatial[0][1].features.shape[0] != 1:
            raise ValueError("pruning needs memories of one object; use a separate memory bank for each object")
        tokens = torch.cat([memory.features for _, memory in spatial]).float().flatten(2)
        rows = self.encoding.detach().flatten(1)[[row for row, _ in spatial]]
        tokens = tokens + rows[..., None].to(tokens)
        return F.cosine_similarity(tokens, tokens[-1:], dim=1).sum(1)


def make(settings: MemorySettings, sam: SAM2Base) -> PrunedPolicy:
    return PrunedPolicy.for_network(sam, drop=settings.pruned_frames, encoding=sam.maskmem_tpos_enc)
