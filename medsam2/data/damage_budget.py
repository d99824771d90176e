"""How much damage a run bears, counted where the batches arrive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from medsam2.errors import UserError

ALWAYS_TOLERATED_READS = 5
"""So that one damaged segment at the start does not end a run."""


class DamageBudget:
    """Damaged segments by key, against a share of what was delivered.

    Counting in the process that takes the batches, not in the workers that read them, makes the decision the same for
    any number of workers.

    Args:
        max_share: `data.max_lost_share`.
    """

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self.clips = 0
        self.keys: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Reads that were lost; a segment counts as often as it was drawn."""
        return self.keys.total()

    def add(self, clips: int, lost: Sequence[str]) -> None:
        """Count the clips of a batch, and the keys of the damaged segments that they replace.

        Raises:
            UserError: more than the share is damaged.
        """
        self.clips += clips
        self.keys.update(lost)
        reads = self.clips + self.total
        if lost and self.total > ALWAYS_TOLERATED_READS and self.total > self.max_share * reads:
            raise UserError(
                f"{self.total} of {reads} segments read are damaged ({len(self.keys)} different ones, the last "
                f"{lost[-1]}), more than data.max_lost_share={self.max_share}. Prepare the shards again "
                "(`medsam2 inspect` names what is wrong), or raise the share."
            )
