"""An endless, randomly accessible order of the clips of one kind (clips, or stills).

Positions come in blocks. Within a block every data set has its quota, spread evenly with jitter, so each batch is
close to the mixture; the k-th place of a data set takes the k-th segment of that data set's own permutation (a new
one each time it is through), so no segment repeats before all were used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medsam2.data.catalog import Catalog
from medsam2.data.counter import Counter, combine, permutation, seed63, uniforms
from medsam2.data.settings import DataSettings
from medsam2.data.sources import Source, mixture_shares, usable_sizes
from medsam2.data.window import choose_objects
from medsam2.errors import UserError
from medsam2.prompts.randomness import RandomStream

BLOCK = 1024


@dataclass(frozen=True)
class PlanEntry:
    """One clip, decided before anything is read.

    Attributes:
        folder, row: the segment: index of the shard folder and row of its index.
        frames: positions in the segment in the clip's order; an entry of a shorter segment repeats some.
        objects: rows of the segment's object table.
        seed: the seed of the clip's augmentation and prompts, below 2**63.
        position: the place among the clips of its stream over the run.
        attempt: 0, or how many damaged segments this entry replaces.
        stream: "clips" or "stills".
        prompt_frame: the clip's frame that is prompted first; every object is present there.
    """

    folder: int
    row: int
    frames: tuple[int, ...]
    objects: tuple[int, ...]
    seed: int
    position: int
    attempt: int = 0
    stream: str = "clips"
    prompt_frame: int = 0


class Stream:
    """Random access to the clips of one kind.

    Args:
        kind: "clips" or "stills".
        catalogs: the opened shard folders.
        sources: the eligible segments.
        settings: the `data` group; for stills with their `clip_frames` and `max_objects`.
        seed: the run's seed.
    """

    def __init__(
        self,
        kind: str,
        catalogs: Sequence[Catalog],
        sources: Sequence[Source],
        settings: DataSettings,
        seed: int,
    ) -> None:
        self.kind = kind
        self.catalogs = catalogs
        self.sources = tuple(sources)
        self.settings = settings
        self.seed = combine(seed, RandomStream.STILLS) if kind == "stills" else seed
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
        block, slot = divmod(position, BLOCK)
        if block not in self._blocks:
            if len(self._blocks) >= 4:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[block] = self._block(block)
        which, ordinals = self._blocks[block]
        return int(which[slot]), int(ordinals[slot])

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and ordinal of each of the BLOCK slots: every source evenly spread, with jitter."""
        which = np.repeat(np.arange(len(self.quotas)), self.quotas)
        within = np.concatenate([np.arange(quota) for quota in self.quotas])
        jitter = uniforms(combine(self.seed, RandomStream.MIXTURE, number), BLOCK)
        order = np.argsort((within + jitter) / self.quotas[which], kind="stable")
        return which[order], (within + number * self.quotas[which])[order]

    def _order(self, which: int, ordinal: int) -> int:
        """The place among the source's rows of its `ordinal`-th clip."""
        rows = len(self.sources[which].rows)
        rounds, place = divmod(ordinal, rows)
        orders = self._orders.setdefault(which, {})
        if rounds not in orders:
            while len(orders) >= 2:  # one round and the next are in use where one ends
                orders.pop(next(iter(orders)))
            orders[rounds] = permutation(combine(self.seed, RandomStream.CLIP_ORDER, which, rounds), rows)
        return int(orders[rounds][place])


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
