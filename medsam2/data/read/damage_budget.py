"""How many damaged segments a run tolerates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from medsam2.errors import UserError

ALWAYS_TOLERATED_READS = 5
"""Damaged reads that never stop a run, so that one damaged segment at its start does not."""


class DamageBudget:
    """Counts damaged segments and stops the run when they exceed a share of the reads.

    The process that receives the batches counts, not the workers that read them, so that the number of workers does
    not change when a run stops.

    Args:
        max_share: largest share of damaged reads (`data.max_lost_share`).
    """

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self.clips = 0
        self.keys: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Number of damaged reads; a segment counts each time it was drawn."""
        return self.keys.total()

    def add(self, clips: int, damaged_keys: Sequence[str]) -> None:
        """Count the clips of a batch and the keys of the damaged segments that they replace.

        Raises:
            UserError: the share of damaged reads is above `max_share`.
        """
        self.clips += clips
        self.keys.update(damaged_keys)
        reads = self.clips + self.total
        if damaged_keys and self.total > ALWAYS_TOLERATED_READS and self.total > self.max_share * reads:
            raise UserError(
                f"{self.total} of {reads} segments read are damaged ({len(self.keys)} different ones, the last "
                f"{damaged_keys[-1]}), more than data.max_lost_share={self.max_share}. Prepare the shards again "
                "(`medsam2 inspect` names what is wrong), or raise the share."
            )
