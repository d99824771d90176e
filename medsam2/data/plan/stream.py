"""An endless, randomly accessible order of the clips of one kind (clips, or stills).

Positions come in blocks. Within a block every data set has its quota, spread evenly with jitter, so each batch is
close to the mixture; the k-th place of a data set takes the k-th segment of that data set's own permutation (a new
one each time it is through), so no segment repeats before all were used.
Legend: T frames of a segment, n frames of a clip, O objects of a segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from medsam2.data.plan.randomness import CounterGenerator, combine, permutation, seed63, uniforms
from medsam2.data.plan.sources import Source, mixture_shares, usable_sizes
from medsam2.data.read.catalog import Catalog
from medsam2.data.settings import DataSettings
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
        usable = usable_sizes(table.pixels.max(axis=1), self.settings)
        weights = np.where(usable, source.name_weights[table.names], 0.0)
        objects, frames = choose_objects(
            table.pixels, weights, self.settings, CounterGenerator(seed, RandomStream.CLIP), prompt_frame=prompt_frame
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


# Which frames and objects of a segment make a clip: decided from its object tables, before anything is decoded.


def reflect(positions: np.ndarray, length: int) -> np.ndarray:
    """Positions outside 0..length-1 folded back in time: 0 1 2 1 0 1 ... for length 3."""
    if length == 1:
        return np.zeros_like(positions)
    period = 2 * (length - 1)
    folded: np.ndarray = np.abs(positions) % period
    folded = np.where(folded < length, folded, period - folded)
    return folded


def choose_window(
    pixels: np.ndarray, settings: DataSettings, draw: CounterGenerator, prompt_frame: int = 0
) -> np.ndarray:
    """Frame positions [n] of a clip around one object with `pixels` [T] on each frame of its segment.

    The object is present on the clip's `prompt_frame`. The drawn stride and direction are given up, in this order,
    before a clip is reflected at an end of its segment; a segment that is shorter than the clip is always reflected.
    `pixels` must reach `settings.min_pixels` somewhere.
    """
    length, count = len(pixels), settings.clip_frames
    widest = min(settings.stride_max, max(1, (length - 1) // max(1, count - 1)))
    stride = 1 + draw.integer(widest)
    backward = draw.uniform() < settings.reverse_probability
    want_absence = draw.uniform() < settings.absence_probability
    fallback: np.ndarray | None = None
    for windows in _options(pixels, stride, backward, settings, prompt_frame):
        if want_absence:
            ending = windows[(pixels[windows] == 0).any(axis=1)]
            if len(ending):
                return _pick(ending, draw)
        if fallback is None:
            fallback = windows
        if not want_absence:
            break
    assert fallback is not None, "an eligible object has a frame"
    return _pick(fallback, draw)


def _options(
    pixels: np.ndarray, stride: int, backward: bool, settings: DataSettings, prompt_frame: int
) -> Iterator[np.ndarray]:
    """Non-empty sets of allowed windows [K, n], the most wanted first; reflected ones only if no other exists."""
    length, places = len(pixels), np.arange(settings.clip_frames) - prompt_frame
    prompted = np.flatnonzero(pixels >= settings.min_pixels)[:, None]
    directions = [backward]
    if 0.0 < settings.reverse_probability < 1.0:
        directions.append(not backward)
    reflected: list[np.ndarray] = []
    some_fit = False
    for step in dict.fromkeys((stride, 1)):
        for back in directions:
            windows = prompted + (-step if back else step) * places
            first, last = windows[:, 0], windows[:, -1]
            fits = (np.minimum(first, last) >= 0) & (np.maximum(first, last) < length)
            if fits.any():
                some_fit = True
                yield windows[fits]
            elif not some_fit:
                reflected.append(reflect(windows, length))
    if not some_fit:
        yield from reflected


def _pick(windows: np.ndarray, draw: CounterGenerator) -> np.ndarray:
    picked: np.ndarray = windows[draw.integer(len(windows))]
    return picked


def choose_objects(
    pixels: np.ndarray, weights: np.ndarray, settings: DataSettings, draw: CounterGenerator, prompt_frame: int = 0
) -> tuple[tuple[int, ...], np.ndarray]:
    """Objects of a clip and its frame positions [n].

    One object is drawn by weight and gets a window; up to `max_objects - 1` others that are present on the clip's
    `prompt_frame` join it, drawn by weight without replacement.

    Args:
        pixels: [O, T] counts. weights: [O], zero where an object must not be used; not all zero.
    """
    eligible = np.where((pixels >= settings.min_pixels).any(axis=1), weights, 0.0)
    first = draw.weighted(eligible)
    frames = choose_window(pixels[first], settings, draw, prompt_frame)
    present = (pixels[:, frames[prompt_frame]] >= settings.min_pixels) & (eligible > 0)
    others = [int(index) for index in np.flatnonzero(present) if index != first]
    # The smallest of exponential times with these rates: weighted sampling without replacement.
    race = sorted((draw.exponential() / float(eligible[index]), index) for index in others)
    return (first, *(index for _, index in race[: settings.max_objects - 1])), frames


def largest_window(pixels: np.ndarray, count: int) -> np.ndarray:
    """The fixed validation window [n] of an object: from its largest frame towards the longer side of the segment."""
    length, start = len(pixels), int(np.argmax(pixels))
    step = 1 if length - start >= start + 1 else -1
    return reflect(start + step * np.arange(count), length)
