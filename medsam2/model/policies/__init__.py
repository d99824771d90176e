"""Memory policies by name; `make_policy` creates one for a network.

To add a policy, write a file here with `NAME` and `make(settings, sam)`, and a yaml in configs/memory/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from medsam2.errors import UserError, did_you_mean
from medsam2.model.memory_bank import MemoryPolicy, MemorySettings
from medsam2.plugins import by_name, modules_of

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

__all__ = ["POLICIES", "MemorySettings", "make_policy"]

POLICIES = {"sam2": lambda settings, sam: MemoryPolicy.for_network(sam)} | {
    name: module.make for name, module in by_name(modules_of(__package__, offers="make"), "memory policies").items()
}


def make_policy(settings: MemorySettings, sam: SAM2Base) -> MemoryPolicy:
    """Create the policy `settings.policy` for the network `sam`; pass it to `Predictor(tracker, policy=...)`.

    Raises:
        UserError: no policy has this name.
    """
    if settings.policy not in POLICIES:
        raise UserError(
            f"memory.policy={settings.policy!r} is unknown; choose one of {', '.join(POLICIES)}."
            f"{did_you_mean(settings.policy, POLICIES)}"
        )
    return POLICIES[settings.policy](settings, sam)
