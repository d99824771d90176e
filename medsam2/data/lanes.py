"""Fixed parts of every global batch, each of which walks through shards of its own.

Without lanes neighbouring clips of the plan are of the same few shards, and ranks take neighbouring clips: on 128
machines each would fetch nearly every shard. A lane is a part of the batch, not a rank, so that the batches still
do not depend on how many ranks there are; a machine that takes one lane, or several, fetches the shards of these alone.

Legend: L lanes, n rows of a data set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Lanes:
    """The lanes of one kind of batch.

    Attributes:
        count: how many there are (L).
        batch: positions of a step over all ranks, a multiple of `count`.
    """

    count: int = 1
    batch: int = 1

    def split(self, position: int) -> tuple[int, int]:
        """(lane, position within the lane) of a position of the run."""
        if self.count == 1:
            return 0, position
        step, slot = divmod(position, self.batch)
        size = self.batch // self.count
        lane, within = divmod(slot, size)
        return lane, step * size + within

    def place(self, ordinal: int, length: int) -> tuple[int, int]:
        """(round, place among the round's n rows) of a data set's `ordinal`-th clip, counted over all lanes.

        Lane `ordinal % L` takes the places of its own stretch of the round, one after the other.
        """
        rounds, place = divmod(ordinal, length)
        if self.count == 1:
            return rounds, place
        return rounds, self._start(ordinal % self.count, rounds, length) + place // self.count

    def starts(self, rounds: int, length: int) -> np.ndarray:
        """int64 [L]: where the stretch of each lane begins among the n rows of a round."""
        return np.array([self._start(lane, rounds, length) for lane in range(self.count)], np.int64)

    def _start(self, lane: int, rounds: int, length: int) -> int:
        """Lanes take turns over the rounds, so where n is no multiple of L, those from `first` on have one row more."""
        whole, more = divmod(length, self.count)
        first = rounds * length % self.count
        longer = max(0, min(lane, first + more) - first) + min(lane, max(0, first + more - self.count))
        return lane * whole + longer
