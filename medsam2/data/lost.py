"""What was lost to damage in a run, counted where the batches arrive."""

from __future__ import annotations

from collections.abc import Sequence

from medsam2.errors import UserError

TOLERATED = 5  # so that one damaged segment at the start does not end a run


class Lost:
    """Damaged segments by key, against a share of what was delivered.

    Counting in the process that takes the batches, not in the workers that read them, makes the decision the same for
    any number of workers.

    Args:
        max_share: `data.max_lost_share`.
    """

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self.clips = 0
        self.keys: dict[str, int] = {}

    @property
    def total(self) -> int:
        """Reads that were lost; a segment counts as often as it was wanted."""
        return sum(self.keys.values())

    def add(self, clips: int, lost: Sequence[str]) -> None:
        """Take note of a batch.

        Raises:
            UserError: more than the share is damaged.
        """
        self.clips += clips
        for key in lost:
            self.keys[key] = self.keys.get(key, 0) + 1
        read = self.clips + self.total
        if lost and self.total > TOLERATED and self.total > self.max_share * read:
            raise UserError(
                f"{self.total} of {read} segments read are damaged ({len(self.keys)} different ones, the last "
                f"{lost[-1]}), more than data.max_lost_share={self.max_share}. Prepare the shards again "
                "(`medsam2 inspect` names what is wrong), or raise the share."
            )
