"""The clips of each training step: a pure function of the seed, the global batch size and the index.

Positions are numbered over the whole run. Step s of a global batch of G clips holds the positions s * G to
s * G + G - 1, and each rank takes a slice of them. The order therefore does not depend on the number of ranks, workers
or accumulated batches, and any step is computed directly. With `stills.share`, some steps are batches of stills; each
kind of batch has separate positions, a separate mixture and a separate batch size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medsam2.data.plan.randomness import CounterGenerator, seed63
from medsam2.data.plan.sources import Source, find_sources, require_matching_patterns, usable_sizes
from medsam2.data.plan.stream import BLOCK_POSITIONS, PlanEntry, Stream, largest_window
from medsam2.data.read.catalog import Catalog
from medsam2.data.settings import DataSettings
from medsam2.prompts.randomness import RandomStream

CLIPS, STILLS = "clips", "stills"


@dataclass(frozen=True)
class ShareRow:
    """One dataset's share of the clips, and how often each of its segments is drawn per epoch.

    Attributes:
        kind: "clips" or "stills".
        source: label of the `Source`.
        cases, segments: their numbers.
        share: of all clips and stills; the shares of all rows sum to 1.
        passes_per_epoch: clips per segment in an epoch.
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
        global_batch: number of clips per optimiser step, over all ranks and accumulated batches.

    Raises:
        UserError: no segment of the split is eligible, or the mixture has a pattern without a dataset or misses a
            dataset.
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
        require_matching_patterns(self.sources, settings)

    def _sources_of_kinds(self) -> dict[str, tuple[tuple[Source, ...], DataSettings]]:
        """Return the sources and the settings of each kind of batch in this run."""
        settings, split = self.settings, self.settings.split
        if not self.stills_share:
            return {CLIPS: (find_sources(self.catalogs, settings, split), settings)}
        kinds = {}
        if self.stills_share < 1:
            kinds[CLIPS] = (find_sources(self.catalogs, settings, split, (2, None)), settings)
        still_settings = settings.model_copy(update={"clip_frames": 1, "max_objects": settings.stills.max_objects})
        lengths = (1, None) if settings.stills.from_clips else (1, 1)
        kinds[STILLS] = (find_sources(self.catalogs, still_settings, split, lengths), still_settings)
        return kinds

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources of clips, then those of stills."""
        return tuple(source for stream in self.streams.values() for source in stream.sources)

    def batch_size(self, kind: str) -> int:
        """Return the number of clips (or stills) per step over all ranks."""
        if kind == CLIPS:
            return self.global_batch
        return max(1, self.global_batch * self.settings.stills.clips_per_batch // self.settings.clips_per_batch)

    def kind(self, step: int) -> str:
        """Return "clips" or "stills" for a step. Steps of stills are evenly spaced, in exactly the configured share."""
        return STILLS if self._stills_before(step + 1) > self._stills_before(step) else CLIPS

    def prompt_frame(self, step: int) -> int:
        """Return the index in the clip of the frame that is prompted first, the same for all clips of a step."""
        if self.settings.prompt_frame == "first" or self.kind(step) == STILLS:
            return 0
        return CounterGenerator(self.seed, RandomStream.PROMPT_FRAME, step).integer(self.settings.clip_frames)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> tuple[PlanEntry, ...]:
        """Return the entries of one optimiser step, or one of its `parts` equal slices, which a rank loads at once.

        Raises:
            ValueError: `parts` does not divide the batch size.
        """
        kind, stills = self.kind(step), self._stills_before(step)
        size = self.batch_size(kind)
        if size % parts:
            raise ValueError(f"a batch of {size} {kind} does not split into {parts} equal parts")
        start = (stills if kind == STILLS else step - stills) * size + part * (size // parts)
        stream, prompt_frame = self.streams[kind], self.prompt_frame(step)
        return tuple(stream.entry(position, 0, prompt_frame) for position in range(start, start + size // parts))

    def substitute(self, entry: PlanEntry) -> PlanEntry:
        """Return the next entry of the same dataset, to replace one whose segment is damaged."""
        return self.streams[entry.stream].entry(entry.position, entry.attempt + 1, entry.prompt_frame)

    def expected_shares(self, steps: int) -> list[ShareRow]:
        """Return the share of each dataset in `steps` steps, for the log at the start of a run."""
        shares = {CLIPS: 1 - self.stills_share, STILLS: self.stills_share}
        clips_of = {kind: shares[kind] * steps * self.batch_size(kind) for kind in self.streams}
        rows = []
        for kind, stream in self.streams.items():
            for source, quota in zip(stream.sources, stream.quotas, strict=True):
                clips = clips_of[kind] * float(quota) / BLOCK_POSITIONS
                segments, share = len(source.rows), clips / sum(clips_of.values())
                passes = clips / segments
                rows.append(ShareRow(kind, source.label, source.modality, source.cases, segments, share, passes))
        return rows

    def _stills_before(self, step: int) -> int:
        return math.floor(step * self.stills_share + self._phase)


def validation_entries(catalogs: Sequence[Catalog], settings: DataSettings, limit: int) -> tuple[PlanEntry, ...]:
    """Return the fixed clips of `val_split`: one per object, from its largest frame on, in index order.

    The clips do not depend on the run's seed, ranks or workers. If there are more than `limit`, evenly spaced ones
    are taken. Each clip's seed depends on its position alone.
    """
    if not limit or not any(settings.val_split in catalog.codes("split")[0] for catalog in catalogs):
        return ()
    objects = []
    for source in find_sources(catalogs, settings, settings.val_split):
        for row in source.rows.tolist():
            table = catalogs[source.folder].objects(row)
            usable = (source.name_weights[table.names] > 0) & usable_sizes(table.pixels.max(axis=1), settings)
            objects += [(source.folder, row, index) for index in np.flatnonzero(usable).tolist()]
    if len(objects) > limit:
        objects = [objects[int(i)] for i in np.linspace(0, len(objects) - 1, limit).round()]
    entries = []
    for position, (folder, row, index) in enumerate(objects):
        window = largest_window(catalogs[folder].objects(row).pixels[index], settings.clip_frames)
        seed = seed63(RandomStream.VALIDATION_CLIP, position)
        entries.append(PlanEntry(folder, row, tuple(window.tolist()), (index,), seed, position))
    return tuple(entries)
