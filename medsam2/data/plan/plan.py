"""Which clip stands at which position of which step: a pure function of the seed, the global batch and the index.

Positions are numbered through the run: the s-th step of a global batch of G clips holds positions s * G ...
s * G + G - 1, and a rank takes its slice. So the order does not depend on ranks, accumulation or workers, and any step
is computed at once. A step is a batch of clips or, where `stills.share` asks for it, of stills; each kind has a
numbering, a mixture and a batch size of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medsam2.data.plan.randomness import CounterGenerator, seed63
from medsam2.data.plan.sources import Source, find_sources, unmatched_patterns, usable_sizes
from medsam2.data.plan.stream import BLOCK, PlanEntry, Stream, largest_window
from medsam2.data.read.catalog import Catalog
from medsam2.data.settings import DataSettings
from medsam2.errors import UserError
from medsam2.prompts.randomness import RandomStream

CLIPS, STILLS = "clips", "stills"


@dataclass(frozen=True)
class ShareRow:
    """What the mixture gives one data set: its share of clips, and how often a segment is seen in an epoch.

    `kind` is "clips" or "stills". The shares of all rows sum to 1.
    """

    kind: str
    source: str
    modality: str
    cases: int
    segments: int
    share: float
    passes_per_epoch: float


class Plan:
    """Random access to the clips of a run.

    Args:
        catalogs: the opened shard folders.
        settings: the `data` group.
        seed: the run's seed.
        global_batch: clips of one optimiser step over all ranks (and its accumulated parts).

    Raises:
        UserError: nothing of the split is eligible, or the mixture names nothing or leaves something out.
    """

    def __init__(self, catalogs: Sequence[Catalog], settings: DataSettings, seed: int, global_batch: int) -> None:
        self.catalogs = tuple(catalogs)
        self.settings = settings
        self.seed = seed
        self.global_batch = global_batch
        self.stills_share = settings.stills.share
        self._phase = CounterGenerator(seed, RandomStream.CLIPS_OR_STILLS).uniform()
        self.streams = {
            kind: Stream(kind, self.catalogs, sources, stream_settings, seed)
            for kind, (sources, stream_settings) in self._sources_of_kinds().items()
        }
        left = unmatched_patterns(self.sources, settings)
        if left:
            raise UserError(f"data.mixture: {left[0][0]!r} matches none of {left[0][1]}")

    def _sources_of_kinds(self) -> dict[str, tuple[tuple[Source, ...], DataSettings]]:
        """The sources and settings of each kind of batch that this run has."""
        own, split = self.settings, self.settings.split
        if not self.stills_share:
            return {CLIPS: (find_sources(self.catalogs, own, split), own)}
        found = {}
        if self.stills_share < 1:
            found[CLIPS] = (find_sources(self.catalogs, own, split, (2, None)), own)
        single = own.model_copy(update={"clip_frames": 1, "max_objects": own.stills.max_objects})
        lengths = (1, None) if own.stills.from_clips else (1, 1)
        found[STILLS] = (find_sources(self.catalogs, single, split, lengths), single)
        return found

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources of all kinds, in the order of `expected_shares`."""
        return tuple(source for stream in self.streams.values() for source in stream.sources)

    def batch_size(self, kind: str) -> int:
        """Clips of one step of a kind over all ranks."""
        if kind == CLIPS:
            return self.global_batch
        return max(1, self.global_batch * self.settings.stills.clips_per_batch // self.settings.clips_per_batch)

    def kind(self, step: int) -> str:
        """Whether a step is of clips or of stills: evenly spread, in exactly the share that was asked for."""
        return STILLS if self._stills_before(step + 1) > self._stills_before(step) else CLIPS

    def prompt_frame(self, step: int) -> int:
        """The clip's frame that is prompted first, the same for the whole step."""
        if self.settings.prompt_frame == "first" or self.kind(step) == STILLS:
            return 0
        return CounterGenerator(self.seed, RandomStream.PROMPT_FRAME, step).integer(self.settings.clip_frames)

    def batch(self, step: int) -> tuple[PlanEntry, ...]:
        """The entries of one optimiser step, over all ranks."""
        return self.part(step, 0, 1)

    def part(self, step: int, part: int, parts: int) -> tuple[PlanEntry, ...]:
        """One of `parts` equal slices of a step: what one rank takes at once."""
        kind, stills = self.kind(step), self._stills_before(step)
        size = self.batch_size(kind)
        if size % parts:
            raise ValueError(f"a batch of {size} {kind} does not split into {parts} equal parts")
        start = (stills if kind == STILLS else step - stills) * size + part * (size // parts)
        stream, prompt_frame = self.streams[kind], self.prompt_frame(step)
        return tuple(stream.entry(position, 0, prompt_frame) for position in range(start, start + size // parts))

    def substitute(self, entry: PlanEntry) -> PlanEntry:
        """The next entry of the same data set, for one whose segment is damaged."""
        return self.streams[entry.stream].entry(entry.position, entry.attempt + 1, entry.prompt_frame)

    def expected_shares(self, steps: int) -> list[ShareRow]:
        """What each data set contributes to an epoch of so many steps, for the log at the start."""
        shares = {CLIPS: 1 - self.stills_share, STILLS: self.stills_share}
        clips_of = {kind: shares[kind] * steps * self.batch_size(kind) for kind in self.streams}
        rows = []
        for kind, stream in self.streams.items():
            for source, quota in zip(stream.sources, stream.quotas, strict=True):
                clips = clips_of[kind] * float(quota) / BLOCK
                segments, share = len(source.rows), clips / sum(clips_of.values())
                passes = clips / segments
                rows.append(ShareRow(kind, source.label, source.modality, source.cases, segments, share, passes))
        return rows

    def _stills_before(self, step: int) -> int:
        return math.floor(step * self.stills_share + self._phase)


def validation_entries(catalogs: Sequence[Catalog], settings: DataSettings, limit: int) -> tuple[PlanEntry, ...]:
    """The fixed clips of `val_split` in index order: one an object, from its largest frame on.

    The same frames, objects and prompts come whenever and wherever they are asked for: more than `limit` are thinned
    evenly, and seeds depend on the place alone.
    """
    if not limit or not any(settings.val_split in catalog.codes("split")[0] for catalog in catalogs):
        return ()
    places = []
    for source in find_sources(catalogs, settings, settings.val_split):
        for row in source.rows.tolist():
            table = catalogs[source.folder].objects(row)
            usable = (source.name_weights[table.names] > 0) & usable_sizes(table.pixels.max(axis=1), settings)
            places += [(source.folder, row, place) for place in np.flatnonzero(usable).tolist()]
    if len(places) > limit:
        places = [places[int(i)] for i in np.linspace(0, len(places) - 1, limit).round()]
    entries = []
    for position, (folder, row, place) in enumerate(places):
        window = largest_window(catalogs[folder].objects(row).pixels[place], settings.clip_frames)
        entries.append(
            PlanEntry(
                folder, row, tuple(window.tolist()), (place,), seed63(RandomStream.VALIDATION_CLIP, position), position
            )
        )
    return tuple(entries)
