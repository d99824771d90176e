"""An endless, randomly accessible order of the clips of one kind (clips, or stills).

Positions come in blocks. Within a block every data set has its quota, spread evenly with jitter, so each batch is
close to the mixture; the k-th place of a data set takes the k-th segment of that data set's own permutation (a new
one each time it is through), so no segment repeats before all were used. With lanes each walks through its own
stretch of that permutation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medsam2.data.catalog import Catalog
from medsam2.data.counter import Counter, combine, hashes, permutation, seed63, uniforms
from medsam2.data.entry import PlanEntry
from medsam2.data.lanes import Lanes
from medsam2.data.settings import DataSettings
from medsam2.data.sources import Source, mixture_shares, usable_sizes
from medsam2.data.window import choose_objects
from medsam2.errors import UserError
from medsam2.prompts.randomness import RandomStream

BLOCK = 1024


class Stream:
    """Random access to the clips of one kind.

    Args:
        kind: "clips" or "stills".
        catalogs: the opened shard folders.
        sources: the eligible segments.
        settings: the `data` group; for stills with their `clip_frames` and `max_objects`.
        seed: the run's seed.
        lanes: of the batches of this kind.
    """

    def __init__(
        self,
        kind: str,
        catalogs: Sequence[Catalog],
        sources: Sequence[Source],
        settings: DataSettings,
        seed: int,
        lanes: Lanes | None = None,
    ) -> None:
        self.kind = kind
        self.catalogs = catalogs
        self.sources = tuple(sources)
        self.settings = settings
        self.seed = combine(seed, RandomStream.STILLS) if kind == "stills" else seed
        self.lanes = lanes or Lanes()
        self.shares = mixture_shares(self.sources, settings)
        self.quotas = _quotas(self.shares)
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._orders: dict[int, dict[int, np.ndarray]] = {}

    def segment(self, position: int, attempt: int = 0) -> tuple[Source, int]:
        """The data set and the row of the segment at a position; `attempt` > 0 gives the next ones of the data set."""
        which, ordinal = self._place(position)
        source = self.sources[which]
        return source, int(source.rows[self._order(which, ordinal + attempt)])

    def entry(self, position: int, attempt: int = 0, prompt_frame: int = 0) -> PlanEntry:
        """The clip at a position."""
        source, row = self.segment(position, attempt)
        seed = seed63(self.seed, RandomStream.CLIP, position, attempt)
        table = self.catalogs[source.folder].objects(row)
        peaks = table.pixels.max(axis=1)
        weights = np.where(usable_sizes(peaks, self.settings), source.name_weights[table.names], 0.0)
        if self.settings.size_balance:
            weights = weights * np.maximum(peaks, 1.0) ** -self.settings.size_balance
        objects, frames = choose_objects(
            table.pixels, weights, self.settings, Counter(seed, RandomStream.CLIP), prompt_frame=prompt_frame
        )
        return PlanEntry(
            folder=source.folder,
            row=row,
            frames=tuple(map(int, frames)),
            objects=objects,
            seed=seed,
            position=position,
            attempt=attempt,
            stream=self.kind,
            prompt_frame=prompt_frame,
        )

    def _place(self, position: int) -> tuple[int, int]:
        """(source, how many places that source had before) of a position."""
        lane, own = self.lanes.split(position)
        block, slot = divmod(own, BLOCK)
        block = block * self.lanes.count + lane
        if block not in self._blocks:
            if len(self._blocks) >= 4:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[block] = self._block(block)
        which, ordinals = self._blocks[block]
        return int(which[slot]), int(ordinals[slot])

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and ordinal of each of the BLOCK slots: every source evenly spread, with jitter."""
        block, lane = divmod(number, self.lanes.count)
        which = np.repeat(np.arange(len(self.quotas)), self.quotas)
        within = np.concatenate([np.arange(quota) for quota in self.quotas])
        jitter = uniforms(combine(self.seed, RandomStream.MIXTURE, number), BLOCK)
        order = np.argsort((within + jitter) / self.quotas[which], kind="stable")
        ordinals = (within + block * self.quotas[which])[order]
        return which[order], ordinals * self.lanes.count + lane

    def _order(self, which: int, ordinal: int) -> int:
        """The place among the source's rows of its `ordinal`-th clip."""
        source = self.sources[which]
        rounds, place = self.lanes.place(ordinal, len(source.rows))
        orders = self._orders.setdefault(which, {})
        if rounds not in orders:
            while len(orders) >= 2:  # one round and the next are in use where one ends
                orders.pop(next(iter(orders)))
            stream = combine(self.seed, RandomStream.CLIP_ORDER, which, rounds)
            orders[rounds] = (
                permutation(stream, len(source.rows))
                if source.shards is None
                else blocks_permutation(
                    stream,
                    source.shards,
                    self.settings.shuffle_shards,
                    self.lanes.starts(rounds, len(source.rows)),
                )
            )
        return int(orders[rounds][place])


def blocks_permutation(stream: int, shards: np.ndarray, together: int, starts: np.ndarray | None = None) -> np.ndarray:
    """int32 [n]: shards in random order, `together` of them at a time, rows in random order within these.

    A shard's segments so stand close to each other, and a cache fetches it about once in a round.

    Args:
        starts: int64 [L], where the stretch of each lane begins; each gets shards, and blocks of them, of its own.
    """
    codes, places = np.unique(shards, return_inverse=True)
    rank = np.empty(len(codes), np.int64)
    rank[permutation(combine(stream, 1), len(codes))] = np.arange(len(codes))
    order, ranks = hashes(combine(stream, 2), len(shards)), rank[places]
    if starts is None or len(starts) == 1:
        return np.lexsort((order, ranks // together)).astype(np.int32)
    rows = np.lexsort((order, ranks))
    firsts = ranks[rows[np.minimum(starts, len(rows) - 1)]]
    lanes = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(rows)))
    return rows[np.lexsort((order[rows], (ranks[rows] - firsts[lanes]) // together, lanes))].astype(np.int32)


def _quotas(shares: np.ndarray) -> np.ndarray:
    """Places of each source in a block: shares by largest remainder, at least one where the share is positive.

    Raises:
        UserError: there are more data sets than places.
    """
    if (shares > 0).sum() > BLOCK:
        raise UserError(f"{(shares > 0).sum()} data sets are mixed; at most {BLOCK} can be. Prepare some together.")
    exact = shares * BLOCK
    quotas: np.ndarray = np.where(shares > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    while quotas.sum() != BLOCK:
        step = 1 if quotas.sum() < BLOCK else -1
        gap = np.where((quotas > 1) | ((step > 0) & (shares > 0)), step * (exact - quotas), -np.inf)
        quotas[int(np.argmax(gap))] += step
    return quotas
