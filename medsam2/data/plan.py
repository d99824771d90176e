"""Which clip stands at which position of which step: a pure function of the seed and the index.

Positions are numbered through the run: step s of a global batch of G holds positions s * G ... s * G + G - 1, and a
rank takes its slice. So the order does not depend on ranks or workers, and any step is computed at once.

Positions come in blocks. Within a block every data set has its quota, spread evenly with jitter, so each batch is
close to the mixture; the k-th place of a data set takes the k-th segment of that data set's own permutation (a new
one each time it is through), so no segment repeats before all were used.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medsam2.data.catalog import Catalog
from medsam2.data.counter import Counter, combine, permutation, seed63, uniforms
from medsam2.data.settings import DataSettings
from medsam2.data.window import choose_objects, largest_window
from medsam2.errors import UserError, did_you_mean

BLOCK = 1024
_ORDER, _MIX, _CLIP, _VAL = 1, 2, 3, 4  # purposes of random numbers


@dataclass(frozen=True)
class PlanEntry:
    """One clip.

    Attributes:
        folder, row: the segment: index of the shard folder and row of its index.
        frames: positions in the segment in the clip's order; an entry of a shorter segment repeats some.
        objects: rows of the segment's object table.
        seed: the seed of the clip's augmentation and prompts, below 2**63.
        position: the place in the run. attempt: 0, or how many damaged segments this entry replaces.
    """

    folder: int
    row: int
    frames: tuple[int, ...]
    objects: tuple[int, ...]
    seed: int
    position: int
    attempt: int = 0


@dataclass(frozen=True)
class Source:
    """The eligible segments of one data set in one folder.

    rows: int32 [n]. name_counts, name_weights: by name code, how many usable objects there are and the weight with
    which one is drawn.
    """

    folder: int
    folder_name: str
    dataset: str
    modality: str
    rows: np.ndarray
    name_counts: np.ndarray
    name_weights: np.ndarray
    cases: int

    @property
    def label(self) -> str:
        return f"{self.folder_name}:{self.dataset}"


@dataclass(frozen=True)
class ShareRow:
    """What the mixture gives one data set: its share of clips, and how often a segment is seen in an epoch."""

    source: str
    modality: str
    cases: int
    segments: int
    share: float
    clips_per_epoch: float
    passes_per_epoch: float


class Plan:
    """Random access to the clips of a run.

    Args:
        catalogs: the opened shard folders.
        settings: the `data` group.
        seed: the run's seed.
        global_batch: clips of one step over all ranks.

    Raises:
        UserError: nothing of the split is eligible, or the mixture names nothing or leaves something out.
    """

    def __init__(self, catalogs: Sequence[Catalog], settings: DataSettings, seed: int, global_batch: int) -> None:
        self.catalogs = tuple(catalogs)
        self.settings = settings
        self.seed = seed
        self.global_batch = global_batch
        self.sources = find_sources(self.catalogs, settings, settings.split)
        self.shares = mixture_shares(self.sources, settings)
        self._quotas = _quotas(self.shares)
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def batch(self, step: int) -> tuple[PlanEntry, ...]:
        """The entries of one step, over all ranks."""
        return self.slice(step, 0, self.global_batch)

    def slice(self, step: int, first: int, count: int) -> tuple[PlanEntry, ...]:
        """`count` entries of a step from its `first` on: what one rank takes."""
        start = step * self.global_batch + first
        return tuple(self.entry(position) for position in range(start, start + count))

    def entry(self, position: int, attempt: int = 0) -> PlanEntry:
        """The entry at a position; `attempt` > 0 gives the next ones of the same data set, for damaged segments."""
        which, ordinal = self._place(position)
        source = self.sources[which]
        row = int(source.rows[self._order(which, ordinal + attempt)])
        seed = seed63(self.seed, _CLIP, position, attempt)
        table = self.catalogs[source.folder].objects(row)
        objects, frames = choose_objects(
            table.pixels, source.name_weights[table.names], self.settings, Counter(seed, _CLIP)
        )
        return PlanEntry(source.folder, row, tuple(map(int, frames)), objects, seed, position, attempt)

    def expected_shares(self, clips_per_epoch: int) -> list[ShareRow]:
        """What each data set contributes, for the log at the start."""
        rows = []
        for source, quota in zip(self.sources, self._quotas, strict=True):
            share = float(quota) / BLOCK
            clips, segments = share * clips_per_epoch, len(source.rows)
            rows.append(ShareRow(source.label, source.modality, source.cases, segments, share, clips, clips / segments))
        return rows

    def _place(self, position: int) -> tuple[int, int]:
        """(source, how many places that source had before) of a position."""
        block, slot = divmod(position, BLOCK)
        if block not in self._blocks:
            if len(self._blocks) >= 4:
                self._blocks.pop(next(iter(self._blocks)))
            self._blocks[block] = self._block(block)
        which, ordinals = self._blocks[block]
        return int(which[slot]), int(ordinals[slot])

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and ordinal of each of the BLOCK slots: every source evenly spread, with jitter."""
        which = np.repeat(np.arange(len(self._quotas)), self._quotas)
        within = np.concatenate([np.arange(quota) for quota in self._quotas])
        jitter = uniforms(combine(self.seed, _MIX, block), BLOCK)
        order = np.argsort((within + jitter) / self._quotas[which], kind="stable")
        return which[order], (within + block * self._quotas[which])[order]

    def _order(self, which: int, ordinal: int) -> int:
        """The place among the source's rows of its `ordinal`-th clip."""
        rounds, place = divmod(ordinal, len(self.sources[which].rows))
        if self._orders.get(which, (-1,))[0] != rounds:
            stream = combine(self.seed, _ORDER, which, rounds)
            self._orders[which] = (rounds, permutation(stream, len(self.sources[which].rows)))
        return int(self._orders[which][1][place])


def find_sources(catalogs: Sequence[Catalog], settings: DataSettings, split: str) -> tuple[Source, ...]:
    """The eligible segments of `split`, by folder, data set and modality."""
    found: list[Source] = []
    for index, catalog in enumerate(catalogs):
        found.extend(_sources_of(index, catalog, settings, split))
    if not found:
        raise UserError(_nothing_found(catalogs, settings, split))
    return tuple(found)


def _sources_of(folder: int, catalog: Catalog, settings: DataSettings, split: str) -> list[Source]:
    usable = _usable_names(catalog.names, settings)[catalog.name_codes] & (catalog.peaks() >= settings.min_pixels)
    totals = np.concatenate([[0], np.cumsum(usable, dtype=np.int64)])
    eligible = np.diff(totals[catalog.object_offsets]) > 0
    splits, split_codes = catalog.codes("split")
    eligible &= split_codes == splits.index(split) if split in splits else False
    datasets, dataset_codes = catalog.codes("dataset")
    modalities, modality_codes = catalog.codes("modality")
    cases, case_codes = catalog.codes("case")
    object_rows = np.repeat(np.arange(len(catalog)), np.diff(catalog.object_offsets))
    sources = []
    for dataset_code, modality_code in sorted(set(zip(dataset_codes.tolist(), modality_codes.tolist(), strict=True))):
        modality = modalities[modality_code]
        if settings.modalities and modality not in settings.modalities:
            continue
        chosen = eligible & (dataset_codes == dataset_code) & (modality_codes == modality_code)
        kept = dict.fromkeys(case_codes[chosen].tolist())
        if settings.limit_cases is not None and len(kept) > settings.limit_cases:
            kept = dict.fromkeys(list(kept)[: settings.limit_cases])
            chosen &= np.isin(case_codes, list(kept))
        if not chosen.any():
            continue
        counts = np.bincount(catalog.name_codes[usable & chosen[object_rows]], minlength=len(catalog.names))
        sources.append(
            Source(
                folder=folder,
                folder_name=catalog.folder.resolve().name,
                dataset=datasets[dataset_code],
                modality=modality,
                rows=np.flatnonzero(chosen).astype(np.int32),
                name_counts=counts,
                name_weights=np.where(counts > 0, np.maximum(counts, 1.0) ** -settings.name_balance, 0.0),
                cases=len(kept),
            )
        )
    return sources


def _usable_names(names: Sequence[str], settings: DataSettings) -> np.ndarray:
    """bool for each name: matched by `include` (when given) and not by `exclude`."""

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return np.array(
        [(not settings.include or matches(n, settings.include)) and not matches(n, settings.exclude) for n in names],
        dtype=bool,
    )


def _nothing_found(catalogs: Sequence[Catalog], settings: DataSettings, split: str) -> str:
    where = ", ".join(str(catalog.folder) for catalog in catalogs)
    splits = sorted({name for catalog in catalogs for name in catalog.codes("split")[0]})
    names = sorted({name for catalog in catalogs for name in catalog.names})
    modalities = sorted({name for catalog in catalogs for name in catalog.codes("modality")[0]})
    if split not in splits:
        return f"{where}: no split {split!r}; there is {', '.join(splits) or 'none'}.{did_you_mean(split, splits)}"
    for key, wanted, options in (("include", settings.include, names), ("modalities", settings.modalities, modalities)):
        if wanted and not any(fnmatch.filter(options, pattern) for pattern in wanted):
            close = did_you_mean(wanted[0], options)
            return f"{where}: data.{key}={list(wanted)} matches none of {', '.join(options)}.{close}"
    return (
        f"{where}: no segment of split {split!r} has an object of data.min_pixels={settings.min_pixels} pixels that "
        "data.include, data.exclude and data.modalities allow; loosen one of them."
    )


def mixture_shares(sources: Sequence[Source], settings: DataSettings) -> np.ndarray:
    """The share of clips of each source, summing to 1."""
    sizes: np.ndarray = np.array([len(source.rows) for source in sources], dtype=float) ** settings.temperature
    if not settings.mixture:
        sizes /= sizes.sum()
        return sizes
    labels = sorted({name for s in sources for name in (s.dataset, s.label, s.modality)})
    members: dict[str, list[int]] = {pattern: [] for pattern in settings.mixture}
    for index, source in enumerate(sources):
        texts = (source.dataset, source.label, source.modality)
        hit = next((p for p in members if any(fnmatch.fnmatchcase(text, p) for text in texts)), None)
        if hit is None:
            raise UserError(
                f"data.mixture leaves out {source.label}; add it with a share (0 to leave it out), or a last entry '*'."
            )
        members[hit].append(index)
    shares: np.ndarray = np.zeros(len(sources))
    for pattern, indices in members.items():
        if not indices and settings.mixture[pattern] > 0:
            close = did_you_mean(pattern, labels)
            raise UserError(f"data.mixture: {pattern!r} matches none of {', '.join(labels)} that is left over.{close}")
        if indices:
            shares[indices] = settings.mixture[pattern] * sizes[indices] / sizes[indices].sum()
    if shares.sum() <= 0:
        raise UserError("data.mixture gives every data set the share 0; give at least one a positive share.")
    shares /= shares.sum()
    return shares


def _quotas(shares: np.ndarray) -> np.ndarray:
    """Places of each source in a block: shares by largest remainder, at least one where the share is positive."""
    exact = shares * BLOCK
    quotas: np.ndarray = np.where(shares > 0, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    while quotas.sum() != BLOCK:
        step = 1 if quotas.sum() < BLOCK else -1
        gap = np.where((quotas > 1) | ((step > 0) & (shares > 0)), step * (exact - quotas), -np.inf)
        quotas[int(np.argmax(gap))] += step
    return quotas


def validation_entries(catalogs: Sequence[Catalog], settings: DataSettings) -> tuple[PlanEntry, ...]:
    """The fixed clips of `val_split` in index order: one an object, from its largest frame on.

    More than `limit_val` are thinned evenly. Seeds depend on the place alone, so that prompts stay the same.
    """
    if not any(settings.val_split in catalog.codes("split")[0] for catalog in catalogs):
        return ()
    pairs = [
        (source.folder, int(row), place)
        for source in find_sources(catalogs, settings, settings.val_split)
        for row in source.rows
        for place, code in enumerate(catalogs[source.folder].objects(int(row)).names)
        if source.name_weights[code] > 0
        and catalogs[source.folder].objects(int(row)).pixels[place].max() >= settings.min_pixels
    ]
    if len(pairs) > settings.limit_val:
        pairs = [pairs[int(i)] for i in np.linspace(0, len(pairs) - 1, settings.limit_val).round()]
    entries = []
    for position, (folder, row, place) in enumerate(pairs):
        window = largest_window(catalogs[folder].objects(row).pixels[place], settings.clip_frames)
        frames = tuple(int(frame) for frame in window)
        entries.append(PlanEntry(folder, row, frames, (place,), seed63(_VAL, position), position))
    return tuple(entries)
