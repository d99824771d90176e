"""SAM 2's own memory bank: conditioning frames, the last six, sixteen pointers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medsam2.model.memory import Sam2Policy, sam2_policy
from medsam2.model.policies.settings import MemorySettings

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

NAME = "sam2"


def make(settings: MemorySettings, sam: SAM2Base) -> Sam2Policy:
    return sam2_policy(sam)
