"""Which segments may be trained on, by data set, and the share of clips that each data set gets.

Everything is computed from whole columns of the index, so that a million segments cost a fraction of a second.
Legend: R rows (segments) of an index, O objects over all of them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medsam2.data.read.catalog import Catalog
from medsam2.data.settings import DataSettings
from medsam2.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Source:
    """The eligible segments of one data set and modality in one folder.

    Attributes:
        rows: int32 [n], rows of the index. cases: of how many cases they are.
        name_weights: by name code, the weight with which an object is drawn (zero: never).
    """

    folder: int
    folder_name: str
    dataset: str
    modality: str
    rows: np.ndarray
    cases: int
    name_weights: np.ndarray

    @property
    def label(self) -> str:
        return f"{self.folder_name}:{self.dataset}"


def find_sources(
    catalogs: Sequence[Catalog], settings: DataSettings, split: str, lengths: tuple[int, int | None] = (1, None)
) -> tuple[Source, ...]:
    """The eligible segments of `split` that have between `lengths` frames, by folder, data set and modality.

    Raises:
        UserError: there is none, with the reason.
    """
    found: list[Source] = []
    for index, catalog in enumerate(catalogs):
        found.extend(_sources_of(index, catalog, settings, split, lengths))
    if not found:
        raise UserError(_nothing_found(catalogs, settings, split, lengths))
    return tuple(found)


def usable_sizes(peaks: np.ndarray, settings: DataSettings) -> np.ndarray:
    """bool: whether objects with these pixel counts on their largest frame are of a size that is trained on."""
    low = max(settings.min_pixels, settings.peak_min)
    return (peaks >= low) & (peaks <= (settings.peak_max or np.iinfo(np.int64).max))


def _sources_of(
    folder: int, catalog: Catalog, settings: DataSettings, split: str, lengths: tuple[int, int | None]
) -> list[Source]:
    splits, split_codes = catalog.codes("split")
    if split not in splits:
        return []
    datasets, dataset_codes = catalog.codes("dataset")
    modalities, modality_codes = catalog.codes("modality")
    groups = dataset_codes.astype(np.int64) * len(modalities) + modality_codes
    chosen = split_codes == splits.index(split)
    if lengths != (1, None):
        chosen &= (catalog.frame_counts >= lengths[0]) & (catalog.frame_counts <= (lengths[1] or 1 << 30))

    group_of, places = np.unique(groups, return_inverse=True)
    pairs = [(datasets[g // len(modalities)], modalities[g % len(modalities)]) for g in group_of.tolist()]
    allowed = np.stack([_allowed(catalog.names, settings, *pair) for pair in pairs])
    object_rows = np.repeat(np.arange(len(catalog), dtype=np.int32), np.diff(catalog.object_offsets))
    usable = usable_sizes(catalog.peaks, settings)
    usable &= allowed[places[object_rows], catalog.name_codes] & chosen[object_rows]
    objects = np.flatnonzero(usable)
    objects_of = _split(objects, places[object_rows[objects]], len(pairs))

    sources = []
    for (dataset, modality), mine in zip(pairs, objects_of, strict=True):
        if not len(mine):
            continue
        rows, cases = _first_cases(catalog.codes("case")[1], np.unique(object_rows[mine]), settings.limit_cases)
        mine = mine[np.isin(object_rows[mine], rows)] if settings.limit_cases is not None else mine
        counts = np.bincount(catalog.name_codes[mine], minlength=len(catalog.names))
        sources.append(
            Source(
                folder=folder,
                folder_name=catalog.name,
                dataset=dataset,
                modality=modality,
                rows=rows,
                cases=cases,
                name_weights=np.where(counts > 0, np.maximum(counts, 1.0) ** -settings.name_balance, 0.0),
            )
        )
    return sources


def _split(values: np.ndarray, groups: np.ndarray, count: int) -> list[np.ndarray]:
    """`values` by group 0..count-1, each in its old order."""
    order = np.argsort(groups, kind="stable")
    return np.split(values[order], np.searchsorted(groups[order], np.arange(1, count)))


def _allowed(names: Sequence[str], settings: DataSettings, dataset: str, modality: str) -> np.ndarray:
    """bool for each name: matched by `include` (when given) and not by `exclude`, in an allowed modality."""
    if settings.modalities and modality not in settings.modalities:
        return np.zeros(len(names), bool)

    def matches(name: str, patterns: Sequence[str]) -> bool:
        texts = (name, f"{dataset}:{name}", f"{modality}:{name}")
        return any(fnmatch.fnmatchcase(text, pattern) for pattern in patterns for text in texts)

    kept = [(not settings.include or matches(n, settings.include)) and not matches(n, settings.exclude) for n in names]
    return np.array(kept, dtype=bool)


def _first_cases(codes: np.ndarray, rows: np.ndarray, limit: int | None) -> tuple[np.ndarray, int]:
    """The rows of the first `limit` cases in index order, and how many cases they are of."""
    found, firsts = np.unique(codes[rows], return_index=True)
    if limit is None or len(found) <= limit:
        return rows, len(found)
    kept = found[np.argsort(firsts)[:limit]]
    return rows[np.isin(codes[rows], kept)], limit


def _nothing_found(
    catalogs: Sequence[Catalog], settings: DataSettings, split: str, lengths: tuple[int, int | None]
) -> str:
    where = ", ".join(catalog.store.shown for catalog in catalogs)
    splits = sorted({name for catalog in catalogs for name in catalog.codes("split")[0]})
    names = sorted({name for catalog in catalogs for name in catalog.names})
    modalities = sorted({name for catalog in catalogs for name in catalog.codes("modality")[0]})
    if split not in splits:
        return f"{where}: no split {split!r}; there is {', '.join(splits) or 'none'}.{did_you_mean(split, splits)}"
    for key, wanted, options in (("include", settings.include, names), ("modalities", settings.modalities, modalities)):
        plain = [pattern.rsplit(":", 1)[-1] for pattern in wanted]
        if wanted and not any(fnmatch.filter(options, pattern) for pattern in plain):
            close = did_you_mean(plain[0], options)
            return f"{where}: data.{key}={list(wanted)} matches none of {', '.join(options)}.{close}"
    if lengths == (1, 1):
        return (
            f"{where}: data.stills.share={settings.stills.share}, but split {split!r} has no segment of one frame that "
            "may be used; data.stills.from_clips=true takes single frames of volumes and clips."
        )
    if lengths[0] > 1:
        return (
            f"{where}: split {split!r} has only segments of one frame that may be used; "
            "train on them with data.clip_frames=1 and data.stills.share=0, or with data.stills.share=1."
        )
    return (
        f"{where}: no segment of split {split!r} has an object of data.min_pixels={settings.min_pixels} pixels that "
        "data.include, data.exclude, data.modalities, data.peak_min and data.peak_max allow; loosen one of them."
    )


def mixture_shares(sources: Sequence[Source], settings: DataSettings) -> np.ndarray:
    """The share of clips of each source, summing to 1.

    Raises:
        UserError: the mixture names nothing that is there, or leaves something out.
    """
    sizes: np.ndarray = np.array([len(source.rows) for source in sources], dtype=float) ** settings.temperature
    if not settings.mixture:
        sizes /= sizes.sum()
        return sizes
    members: dict[str, list[int]] = {pattern: [] for pattern in settings.mixture}
    for index, source in enumerate(sources):
        hit = _pattern_of(source, settings)
        if hit is None:
            raise UserError(
                f"data.mixture leaves out {source.label}; add it with a share (0 to leave it out), or a last entry '*'."
            )
        members[hit].append(index)
    shares: np.ndarray = np.zeros(len(sources))
    for pattern, indices in members.items():
        if indices:
            shares[indices] = settings.mixture[pattern] * sizes[indices] / sizes[indices].sum()
    if shares.sum() <= 0:
        raise UserError("data.mixture gives every data set the share 0; give at least one a positive share.")
    shares /= shares.sum()
    return shares


def _pattern_of(source: Source, settings: DataSettings) -> str | None:
    """The first pattern of the mixture that matches a source: the one that counts."""
    texts = (source.dataset, source.label, source.modality)
    return next((p for p in settings.mixture if any(fnmatch.fnmatchcase(text, p) for text in texts)), None)


def unmatched_patterns(sources: Sequence[Source], settings: DataSettings) -> list[tuple[str, str]]:
    """Patterns of the mixture with a positive share that no source is left for, each with a hint of what there is."""
    taken = {_pattern_of(source, settings) for source in sources}
    labels = sorted({name for s in sources for name in (s.dataset, s.label, s.modality)})
    return [
        (pattern, f"{', '.join(labels)} that is left over.{did_you_mean(pattern, labels)}")
        for pattern, share in settings.mixture.items()
        if share > 0 and pattern not in taken
    ]
