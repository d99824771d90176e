"""The segments that are eligible for training, grouped by dataset, and each dataset's share of the clips.

All functions work on whole columns of the index, so that a million segments take a fraction of a second.
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
    """The eligible segments of one dataset and modality in one folder.

    Attributes:
        folder: index of the shard folder.
        rows: int32 [n], rows of the folder's index. cases: number of cases that they belong to.
        name_weights: float [names], the weight with which objects of each structure are drawn; 0 excludes them.
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
    """Return the eligible segments of `split` by folder, dataset and modality.

    Args:
        lengths: smallest and largest number of frames of a segment; None: no upper limit.

    Raises:
        UserError: no segment is eligible; the message says why and what to change.
    """
    sources: list[Source] = []
    for folder, catalog in enumerate(catalogs):
        sources += _folder_sources(folder, catalog, settings, split, lengths)
    if not sources:
        raise UserError(_explain_no_sources(catalogs, settings, split, lengths))
    return tuple(sources)


def usable_sizes(peaks: np.ndarray, settings: DataSettings) -> np.ndarray:
    """Return whether objects are of a size that is trained on, from their pixels on their largest frame: bool [O]."""
    low = max(settings.min_pixels, settings.peak_min)
    return (peaks >= low) & (peaks <= (settings.peak_max or np.iinfo(np.int64).max))


def _folder_sources(
    folder: int, catalog: Catalog, settings: DataSettings, split: str, lengths: tuple[int, int | None]
) -> list[Source]:
    splits, split_codes = catalog.codes("split")
    if split not in splits:
        return []
    datasets, dataset_codes = catalog.codes("dataset")
    modalities, modality_codes = catalog.codes("modality")
    groups = dataset_codes.astype(np.int64) * len(modalities) + modality_codes
    eligible_rows = split_codes == splits.index(split)
    if lengths != (1, None):
        eligible_rows &= (catalog.frame_counts >= lengths[0]) & (catalog.frame_counts <= (lengths[1] or 1 << 30))

    group_codes, row_pairs = np.unique(groups, return_inverse=True)
    pairs = [(datasets[g // len(modalities)], modalities[g % len(modalities)]) for g in group_codes.tolist()]
    allowed = np.stack([_allowed(catalog.names, settings, *pair) for pair in pairs])
    object_rows = np.repeat(np.arange(len(catalog), dtype=np.int32), np.diff(catalog.object_offsets))
    usable = usable_sizes(catalog.peaks, settings)
    usable &= allowed[row_pairs[object_rows], catalog.name_codes] & eligible_rows[object_rows]
    usable_objects = np.flatnonzero(usable)
    object_pairs = row_pairs[object_rows[usable_objects]]
    order = np.argsort(object_pairs, kind="stable")
    ends = np.searchsorted(object_pairs[order], np.arange(1, len(pairs)))
    objects_by_pair = np.split(usable_objects[order], ends)

    sources = []
    for (dataset, modality), objects in zip(pairs, objects_by_pair, strict=True):
        if not len(objects):
            continue
        rows, cases = _first_cases(catalog.codes("case")[1], np.unique(object_rows[objects]), settings.limit_cases)
        if settings.limit_cases is not None:
            objects = objects[np.isin(object_rows[objects], rows)]
        counts = np.bincount(catalog.name_codes[objects], minlength=len(catalog.names))
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


def _allowed(names: Sequence[str], settings: DataSettings, dataset: str, modality: str) -> np.ndarray:
    """Return bool for each structure name: allowed by `include`, `exclude` and `modalities`."""
    if settings.modalities and modality not in settings.modalities:
        return np.zeros(len(names), bool)

    def matches(name: str, patterns: Sequence[str]) -> bool:
        texts = (name, f"{dataset}:{name}", f"{modality}:{name}")
        return any(fnmatch.fnmatchcase(text, pattern) for pattern in patterns for text in texts)

    included = [not settings.include or matches(name, settings.include) for name in names]
    excluded = [matches(name, settings.exclude) for name in names]
    return np.array(included, dtype=bool) & ~np.array(excluded, dtype=bool)


def _first_cases(codes: np.ndarray, rows: np.ndarray, limit: int | None) -> tuple[np.ndarray, int]:
    """Return the rows of the first `limit` cases in index order, and the number of cases."""
    cases, first_rows = np.unique(codes[rows], return_index=True)
    if limit is None or len(cases) <= limit:
        return rows, len(cases)
    return rows[np.isin(codes[rows], cases[np.argsort(first_rows)[:limit]])], limit


def _explain_no_sources(
    catalogs: Sequence[Catalog], settings: DataSettings, split: str, lengths: tuple[int, int | None]
) -> str:
    folders = ", ".join(catalog.store.path for catalog in catalogs)
    splits = sorted({name for catalog in catalogs for name in catalog.codes("split")[0]})
    names = sorted({name for catalog in catalogs for name in catalog.names})
    modalities = sorted({name for catalog in catalogs for name in catalog.codes("modality")[0]})
    if split not in splits:
        return (
            f"{folders}: no split {split!r}; the splits are {', '.join(splits) or 'none'}.{did_you_mean(split, splits)}"
        )
    for key, globs, options in (("include", settings.include, names), ("modalities", settings.modalities, modalities)):
        unprefixed = [pattern.rsplit(":", 1)[-1] for pattern in globs]
        if globs and not any(fnmatch.filter(options, pattern) for pattern in unprefixed):
            hint = did_you_mean(unprefixed[0], options)
            return f"{folders}: data.{key}={list(globs)} matches none of {', '.join(options)}.{hint}"
    if lengths == (1, 1):
        return (
            f"{folders}: data.stills.share={settings.stills.share}, but split {split!r} has no eligible segment of one "
            "frame. Set data.stills.from_clips=true to use single frames of volumes and clips."
        )
    if lengths[0] > 1:
        return (
            f"{folders}: all eligible segments of split {split!r} have one frame. Set data.clip_frames=1 and "
            "data.stills.share=0, or data.stills.share=1."
        )
    return (
        f"{folders}: no segment of split {split!r} has an object of data.min_pixels={settings.min_pixels} pixels that "
        "data.include, data.exclude, data.modalities, data.peak_min and data.peak_max allow. Loosen one of them."
    )


def mixture_shares(sources: Sequence[Source], settings: DataSettings) -> np.ndarray:
    """Return each source's share of the clips: float [sources], summing to 1.

    Raises:
        UserError: the mixture misses a source, or all shares are 0.
    """
    sizes: np.ndarray = np.array([len(source.rows) for source in sources], dtype=float) ** settings.temperature
    if not settings.mixture:
        sizes /= sizes.sum()
        return sizes
    members: dict[str, list[int]] = {pattern: [] for pattern in settings.mixture}
    for index, source in enumerate(sources):
        pattern = _pattern_of(source, settings)
        if pattern is None:
            raise UserError(
                f"data.mixture leaves out {source.label}. Add it with a share (0 excludes it), or add a last entry '*'."
            )
        members[pattern].append(index)
    shares: np.ndarray = np.zeros(len(sources))
    for pattern, indices in members.items():
        if indices:
            shares[indices] = settings.mixture[pattern] * sizes[indices] / sizes[indices].sum()
    if shares.sum() <= 0:
        raise UserError("data.mixture gives every dataset the share 0; give at least one a positive share.")
    shares /= shares.sum()
    return shares


def _pattern_of(source: Source, settings: DataSettings) -> str | None:
    """Return the first pattern of the mixture that matches a source."""
    texts = (source.dataset, source.label, source.modality)
    return next((p for p in settings.mixture if any(fnmatch.fnmatchcase(text, p) for text in texts)), None)


def require_matching_patterns(sources: Sequence[Source], settings: DataSettings) -> None:
    """Check that each pattern of the mixture with a positive share matches a source that no earlier pattern matches.

    Raises:
        UserError: a pattern does not.
    """
    matching = {_pattern_of(source, settings) for source in sources}
    labels = sorted({name for s in sources for name in (s.dataset, s.label, s.modality)})
    for pattern, share in settings.mixture.items():
        if share > 0 and pattern not in matching:
            raise UserError(
                f"data.mixture: {pattern!r} matches none of {', '.join(labels)} that an earlier pattern does not match."
                + did_you_mean(pattern, labels)
            )
