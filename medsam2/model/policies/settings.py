"""Which memory policy predicts, and its numbers: see configs/memory/."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class MemorySettings(BaseModel):
    """The policy of the memory bank.

    Attributes:
        policy: sam2 (the released rule), pruned (SurgSAM-2's efficient frame pruning) or self_sorting (MedSAM-2's
            confidence memory bank).
        pruned_frames: how many memories pruning drops once the bank is full.
        capacity: memories that self-sorting keeps for an object, and draws for a frame.
        confidence: self-sorting admits a tracked frame whose predicted IoU reaches this.
        replace: how a full self-sorting bank makes room: dissimilarity (the paper: keep the `capacity` least similar
            to the others) or nearest (the released code's exchange of near duplicates).
        seed: of the draws.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str = "sam2"
    pruned_frames: int = Field(2, ge=0)
    capacity: int = Field(16, ge=1)
    confidence: float = Field(0.5, ge=0, le=1)
    replace: Literal["dissimilarity", "nearest"] = "dissimilarity"
    seed: int = 0
