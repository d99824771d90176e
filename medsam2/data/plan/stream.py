"""An endless sequence of clips (or of stills) with random access.

The sequence consists of blocks. Each source (a dataset and modality of a folder) has a quota of the positions of a
block, spread evenly with jitter, so that each batch is close to the mixture. The k-th position of a source takes the
k-th segment of a permutation of its segments. Each pass has another permutation, so that no segment repeats within a
pass.
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

BLOCK_POSITIONS = 1024
MAX_CACHED_BLOCKS = 4
MAX_CACHED_PASSES = 2
"""Permutations per source: at the end of a pass, the next one is in use, too."""


@dataclass(frozen=True)
class PlanEntry:
    """Which frames and objects of which segment make a clip.

    Attributes:
        folder: index of the shard folder. row: the segment's row in the folder's index.
        frames: frame indices in the segment, in the clip's order; a clip longer than its segment repeats frames.
        objects: rows of the segment's object table.
        seed: for the clip's augmentation and prompts; below 2**63.
        position: index of the clip in its stream.
        attempt: number of damaged segments that were drawn before at this position.
        stream: "clips" or "stills".
        prompt_frame: index in the clip of the frame that is prompted first; all objects are present there.
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
    """Random access to the clips (or to the stills) of a run.

    Args:
        kind: "clips" or "stills".
        catalogs: the opened shard folders.
        sources: the eligible segments.
        settings: the `data` group, for stills with their values of `clip_frames` and `max_objects`.
        seed: the run's seed.
    """

    def __init__(
        self, kind: str, catalogs: Sequence[Catalog], sources: Sequence[Source], settings: DataSettings, seed: int
    ) -> None:
        self.kind = kind
        self.catalogs = catalogs
        self.sources = tuple(sources)
        self.settings = settings
        self.seed = combine(seed, RandomStream.STILLS) if kind == "stills" else seed
        self.shares = mixture_shares(self.sources, settings)
        self.quotas = _quotas(self.shares)
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._permutations: dict[int, dict[int, np.ndarray]] = {}

    def segment(self, position: int, attempt: int = 0) -> tuple[Source, int]:
        """Return the source and the row of the segment at a position; `attempt` > 0 skips as many of the source."""
        source_index, ordinal = self._locate(position)
        source = self.sources[source_index]
        return source, int(source.rows[self._permuted(source_index, ordinal + attempt)])

    def entry(self, position: int, attempt: int = 0, prompt_frame: int = 0) -> PlanEntry:
        """Return the clip at a position; arguments as in `segment` and `PlanEntry`."""
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

    def _locate(self, position: int) -> tuple[int, int]:
        """Return the source of a position, and how many positions that source has before it."""
        number, slot = divmod(position, BLOCK_POSITIONS)
        if number not in self._blocks:
            if len(self._blocks) >= MAX_CACHED_BLOCKS:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[number] = self._block(number)
        source_indices, ordinals = self._blocks[number]
        return int(source_indices[slot]), int(ordinals[slot])

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source and the ordinal of each position of a block: sources evenly spread, with jitter."""
        source_indices = np.repeat(np.arange(len(self.quotas)), self.quotas)
        ordinals = np.concatenate([np.arange(quota) for quota in self.quotas])
        jitter = uniforms(combine(self.seed, RandomStream.MIXTURE, number), BLOCK_POSITIONS)
        order = np.argsort((ordinals + jitter) / self.quotas[source_indices], kind="stable")
        return source_indices[order], (ordinals + number * self.quotas[source_indices])[order]

    def _permuted(self, source_index: int, ordinal: int) -> int:
        """Return the index, among a source's rows, of its `ordinal`-th segment."""
        num_rows = len(self.sources[source_index].rows)
        pass_number, index = divmod(ordinal, num_rows)
        permutations = self._permutations.setdefault(source_index, {})
        if pass_number not in permutations:
            if len(permutations) >= MAX_CACHED_PASSES:
                permutations.pop(next(iter(permutations)))
            seed = combine(self.seed, RandomStream.CLIP_ORDER, source_index, pass_number)
            permutations[pass_number] = permutation(seed, num_rows)
        return int(permutations[pass_number][index])


def _quotas(shares: np.ndarray) -> np.ndarray:
    """Return each source's number of positions per block: its share by largest remainder, 1 at least if positive.

    Raises:
        UserError: there are more sources than positions in a block.
    """
    if (shares > 0).sum() > BLOCK_POSITIONS:
        raise UserError(
            f"data.mixture: {(shares > 0).sum()} datasets have a share, at most {BLOCK_POSITIONS} can. Prepare some of "
            "them as one dataset."
        )
    exact = shares * BLOCK_POSITIONS
    quotas: np.ndarray = np.where(shares > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    while quotas.sum() != BLOCK_POSITIONS:
        step = 1 if quotas.sum() < BLOCK_POSITIONS else -1
        gap = np.where((quotas > 1) | ((step > 0) & (shares > 0)), step * (exact - quotas), -np.inf)
        quotas[int(np.argmax(gap))] += step
    return quotas


# The frames and objects of a clip. They are chosen from the segment's object table, before any frame is decoded.


def reflect(positions: np.ndarray, length: int) -> np.ndarray:
    """Fold positions outside of 0..length-1 back, as in reflection padding: 0 1 2 1 0 1 ... for length 3."""
    if length == 1:
        return np.zeros_like(positions)
    period = 2 * (length - 1)
    folded: np.ndarray = np.abs(positions) % period
    folded = np.where(folded < length, folded, period - folded)
    return folded


def choose_window(
    pixels: np.ndarray, settings: DataSettings, generator: CounterGenerator, prompt_frame: int = 0
) -> np.ndarray:
    """Draw a clip around one object: frame indices [n] in its segment.

    The object is present on the clip's `prompt_frame`. If no clip of the drawn stride and direction fits, stride 1 and
    the other direction are tried; if none of them fits (always in a segment shorter than the clip), the clip is
    reflected at an end of the segment.

    Args:
        pixels: [T], the object's number of pixels on each frame; at least `settings.min_pixels` on one of them.
    """
    length, count = len(pixels), settings.clip_frames
    widest = min(settings.stride_max, max(1, (length - 1) // max(1, count - 1)))
    stride = 1 + generator.integer(widest)
    backward = generator.uniform() < settings.reverse_probability
    wants_absence = generator.uniform() < settings.absence_probability
    candidates = _candidate_windows(pixels, stride, backward, settings, prompt_frame)
    windows = next(candidates)
    if wants_absence:
        with_absence = (group[(pixels[group] == 0).any(axis=1)] for group in (windows, *candidates))
        windows = next((group for group in with_absence if len(group)), windows)
    window: np.ndarray = windows[generator.integer(len(windows))]
    return window


def _candidate_windows(
    pixels: np.ndarray, stride: int, backward: bool, settings: DataSettings, prompt_frame: int
) -> Iterator[np.ndarray]:
    """Yield non-empty sets of allowed windows [K, n] in order of preference; reflected ones only if no other fits."""
    length, offsets = len(pixels), np.arange(settings.clip_frames) - prompt_frame
    prompted = np.flatnonzero(pixels >= settings.min_pixels)[:, None]
    directions = [backward]
    if 0.0 < settings.reverse_probability < 1.0:
        directions.append(not backward)
    reflected: list[np.ndarray] = []
    some_fit = False
    for step in dict.fromkeys((stride, 1)):
        for reverse in directions:
            windows = prompted + (-step if reverse else step) * offsets
            first, last = windows[:, 0], windows[:, -1]
            fits = (np.minimum(first, last) >= 0) & (np.maximum(first, last) < length)
            if fits.any():
                some_fit = True
                yield windows[fits]
            elif not some_fit:
                reflected.append(reflect(windows, length))
    if not some_fit:
        yield from reflected


def choose_objects(
    pixels: np.ndarray, weights: np.ndarray, settings: DataSettings, generator: CounterGenerator, prompt_frame: int = 0
) -> tuple[tuple[int, ...], np.ndarray]:
    """Draw the objects of a clip and its frame indices [n] in the segment.

    One object is drawn by weight, then a window around it. Up to `max_objects - 1` other objects that are present on
    the clip's `prompt_frame` are added, drawn by weight without replacement.

    Args:
        pixels: [O, T] pixel counts. weights: [O], 0 for objects that must not be used; not all 0.
    """
    eligible = np.where((pixels >= settings.min_pixels).any(axis=1), weights, 0.0)
    first = generator.weighted(eligible)
    frames = choose_window(pixels[first], settings, generator, prompt_frame)
    present = (pixels[:, frames[prompt_frame]] >= settings.min_pixels) & (eligible > 0)
    others = [int(index) for index in np.flatnonzero(present) if index != first]
    # Ordering by exponential times, whose rates are the weights, is weighted sampling without replacement.
    times = sorted((generator.exponential() / float(eligible[index]), index) for index in others)
    return (first, *(index for _, index in times[: settings.max_objects - 1])), frames


def largest_window(pixels: np.ndarray, count: int) -> np.ndarray:
    """Return the validation window [count] of an object with `pixels` [T]: frame indices in its segment.

    It starts at the object's largest frame and runs towards the end of the segment that is farther away.
    """
    length, start = len(pixels), int(np.argmax(pixels))
    step = 1 if length - start >= start + 1 else -1
    return reflect(start + step * np.arange(count), length)
