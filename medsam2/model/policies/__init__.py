"""Memory policies by name; `make_policy` makes one for a network. A new one is a file here with `NAME` and `make`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medsam2.errors import UserError, did_you_mean
from medsam2.model.memory import MemoryPolicy
from medsam2.model.policies import pruned, sam2, self_sorting
from medsam2.model.policies.settings import MemorySettings

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

__all__ = ["POLICIES", "MemorySettings", "make_policy"]

POLICIES = {module.NAME: module.make for module in (sam2, pruned, self_sorting)}


def make_policy(settings: MemorySettings, sam: SAM2Base) -> MemoryPolicy:
    """The policy that `settings` name, with the numbers of `sam`; give it to `Predictor(tracker, policy=...)`.

    Raises:
        UserError: no policy has this name.
    """
    if settings.policy not in POLICIES:
        raise UserError(
            f"memory.policy={settings.policy!r} is unknown; choose one of {', '.join(POLICIES)}."
            f"{did_you_mean(settings.policy, POLICIES)}"
        )
    return POLICIES[settings.policy](settings, sam)
