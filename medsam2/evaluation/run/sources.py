"""Lists and loads the cases of an evaluation, from a folder of shards or from raw data.

Shards are scored on their stored grid, which is the native one up to `max_side` of `medsam2 prepare`; raw data on its
native grid. No output contains names of cases or patients: both sources give salted hashes.

Legend: N objects, P label planes, T frames, C channels, H and W pixels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsam2.cases.case import Label
from medsam2.data.read.store import ShardStore, open_store, store_index
from medsam2.errors import UserError, did_you_mean
from medsam2.evaluation.loaded_case import LoadedCase
from medsam2.inference.frames import channels_first
from medsam2.shards.index import INDEX_FILE, SegmentIndex, read_summary

if TYPE_CHECKING:
    from medsam2.cases.case import CaseRef
    from medsam2.cases.settings import SettingsBook

ALL_SPLITS = "all"
LOCATION_COLUMNS = ("split", "shard", "frame_offset", "mask_offset", "json_offset")
"""Columns of the index on which the scores of a case do not depend."""


@dataclass(frozen=True)
class CaseName:
    """The identity of a case without personal data, known before it is read.

    Attributes:
        key: 16 hexadecimal digits, unique in the source and independent of `limit`. dataset, case: names; the case is
            a salted hash.
        state: a digest of what its scores depend on: image, masks, spacing, window and the files that hold them.
        size: approximate cost of predicting it: frames times objects; 1 if unknown before reading.
    """

    key: str
    dataset: str
    case: str
    state: str
    size: int = 1


@dataclass(frozen=True)
class CaseList:
    """The cases of a source, loaded one by one.

    Attributes:
        source: the folder or URL. grid: "stored" (shards) or "native" (raw). available: number of cases before `limit`.
    """

    source: str
    grid: str
    available: int
    _entries: tuple[Any, ...]
    _index: SegmentIndex | None
    _structures: tuple[str, ...]

    @property
    def count(self) -> int:
        """Number of cases."""
        return len(self._entries)

    def names(self) -> list[CaseName]:
        """Names of all cases, in order, without reading voxels."""
        names = _stored_names(self._index, self._entries) if self._index else map(_raw_name, self._entries)
        counts: Counter[str] = Counter()
        unique = []
        for name in names:  # two cases of a raw dataset may have the same name
            counts[name.key] += 1
            unique.append(replace(name, key=_digest((name.key, counts[name.key]))))
        return unique

    def redact_names(self, number: int, text: str) -> str:
        """Remove paths and names of case `number` from an error text, because they may contain a patient's name."""
        entry = self._entries[number]
        if self._index is not None:
            return text
        private = {str(part) for file in entry.files for part in (file, file.resolve(), file.name)}
        private |= {entry.case_id, entry.patient_id}
        for word in sorted(private - {""}, key=len, reverse=True):
            text = text.replace(word, "(case)")
        return text

    def load(self, number: int) -> LoadedCase:
        """Read one case.

        Raises:
            UserError: the case cannot be read (CaseError for raw data).
        """
        entry = self._entries[number]
        case = _from_shard(self._index, entry) if self._index else _from_raw(entry)
        if not self._structures:
            return case
        return replace(case, objects=tuple(label for label in case.objects if label.name in self._structures))


def list_cases(
    source: str | Path,
    split: str = "val",
    limit: int = 0,
    structures: tuple[str, ...] = (),
    layout: str | None = None,
    modality: str | None = None,
    book: SettingsBook | None = None,
) -> CaseList:
    """List the cases of a source without reading voxels.

    Args:
        source: shards (a folder or a URL), or raw data in any layout.
        split: of a shard folder, or "all"; raw data has no splits.
        limit: maximum number of cases per dataset, 0 for all: the first ones, of shards in the order of content, of raw
            data in the order of names. structures: keep only objects with these names.
        layout, modality, book: of raw data (`medsam2.cases.layouts.find_cases`).

    Raises:
        UserError: no such folder, split, case or structure; or options of raw data for shards.
    """
    folder = Path(source)
    url = "://" in str(source)
    if url or (folder / INDEX_FILE).is_file() or (folder.is_dir() and any(folder.glob(f"*/{INDEX_FILE}"))):
        for name, value in (("layout", layout), ("modality", modality), ("config", book)):
            if value is not None:
                raise UserError(f"data.{name} is for raw data, but {source} holds shards; remove it.")
        index = store_index(open_store(source))
        rows = _rows(index, split, structures)
        limited = _limit_per_dataset(rows, index.table["dataset"].to_pylist(), limit)
        return CaseList(str(source), "stored", len(rows), tuple(limited), index, structures)
    from medsam2.cases.layouts import find_cases

    refs = find_cases(folder, layout, modality, book)
    limited = _limit_per_dataset(range(len(refs)), [ref.dataset for ref in refs], limit)
    return CaseList(str(source), "native", len(refs), tuple(refs[number] for number in limited), None, structures)


def load_cases(source: str | Path | ShardStore, split: str = "val", limit: int = 0) -> list[LoadedCase]:
    """Load all labelled cases of one split of a shard folder or URL; an empty list if the split has none."""
    index = store_index(open_store(source) if isinstance(source, str | Path) else source)
    rows = [row for row, name in enumerate(index.table["split"].to_pylist()) if name == split]
    rows = _limit_per_dataset(rows, index.table["dataset"].to_pylist(), limit)
    return [case for case in (_from_shard(index, row) for row in rows) if case.objects]


def _rows(index: SegmentIndex, split: str, structures: tuple[str, ...]) -> list[int]:
    """Rows of the index that belong to the split and contain one of `structures`."""
    splits = index.table["split"].to_pylist()
    available = sorted(set(splits))
    if split != ALL_SPLITS and split not in available:
        hint = did_you_mean(split, [*available, ALL_SPLITS])
        raise UserError(f"split={split}: {index.folder} has the splits {', '.join(available)}, or 'all'.{hint}")
    rows = [row for row, name in enumerate(splits) if split in (name, ALL_SPLITS)]
    if structures:
        names = {row: {entry["name"] for entry in index.table["objects"][row].as_py()} for row in rows}
        available = sorted(set().union(*names.values()))
        for name in structures:
            if name not in available:
                hint = did_you_mean(name, available)
                raise UserError(f"structures: {name!r} is not in {index.folder}; it has {', '.join(available)}.{hint}")
        rows = [row for row in rows if names[row] & set(structures)]
    if not rows:
        raise UserError(f"{index.folder}: no case in split {split!r}.")
    return rows


def _limit_per_dataset(rows: Iterable[int], datasets: Sequence[str], limit: int) -> list[int]:
    """The first `limit` rows of each dataset (all rows for 0), in order; `datasets` is indexed by row."""
    counts: Counter[str] = Counter()
    limited = []
    for row in rows:
        counts[datasets[row]] += 1
        if not limit or counts[datasets[row]] <= limit:
            limited.append(row)
    return limited


def _stored_names(index: SegmentIndex, rows: Iterable[int]) -> Iterator[CaseName]:
    """Names of stored cases; `state` covers the index row (objects, window, spacing, image hash) and the shard."""
    shards = read_summary(index.folder).get("shards")
    shards = shards if isinstance(shards, dict) else {}
    for row in rows:
        entry = index.row(row)
        content = {name: value for name, value in vars(entry).items() if name not in LOCATION_COLUMNS}
        size = len(entry.frames) * max(len(entry.objects), 1)
        yield CaseName(entry.key, entry.dataset, entry.case, _digest((content, shards.get(entry.shard))), size)


def _raw_name(ref: CaseRef) -> CaseName:
    from medsam2.shards.prepare.pseudonyms import read_salt, salted_hash, slug

    dataset, case = slug(ref.dataset), salted_hash(read_salt(), "case", ref.dataset, ref.case_id)
    paths = [sorted(path.rglob("*")) if path.is_dir() else [path] for path in ref.files]
    files = [_file_state(path) for path in chain.from_iterable(paths)]
    return CaseName(
        f"{dataset} {case}",
        dataset,
        case,
        _digest((files, ref.modality, ref.part, ref.labels, ref.spacing, ref.settings)),
    )


def _file_state(path: Path) -> tuple[str, int, int] | None:
    """Name, size in bytes and time of modification in ns; None if the file does not exist."""
    status = path.stat() if path.exists() else None
    return status and (path.name, status.st_size, status.st_mtime_ns)


def _digest(content: Any) -> str:
    """16 hexadecimal digits of the sha256 of the `repr` of plain values and dataclasses."""
    return hashlib.sha256(repr(content).encode(errors="surrogateescape")).hexdigest()[:16]


def _from_shard(index: SegmentIndex, row: int) -> LoadedCase:
    from medsam2.shards.load import load_segment, stored_spacing

    entry, image, planes = load_segment(index, row)
    objects = tuple(Label(o.value, o.name, o.plane) for o in entry.objects if max(o.pixels, default=0))
    return LoadedCase(
        frames=channels_first(image),
        planes=planes,
        objects=objects,
        spacing=stored_spacing(entry),
        kind=entry.kind,
        modality=entry.modality,
        dataset=entry.dataset,
        case=entry.case,
        patient=entry.patient,
        content_hash=entry.content_hash,
    )


def _from_raw(ref: CaseRef) -> LoadedCase:
    from medsam2.cases.intensity import to_uint8
    from medsam2.cases.layouts import load_case
    from medsam2.shards.prepare.pseudonyms import read_salt, salted_hash, slug

    case, salt = load_case(ref), read_salt()
    image, _ = to_uint8(case, ref.settings.clip_windows[0], ref.settings.percentiles)
    return LoadedCase(
        frames=channels_first(image),
        planes=case.planes,
        objects=tuple(label for label in case.labels if (case.planes[label.plane] == label.id).any()),
        spacing=case.spacing,
        kind=case.kind,
        modality=case.modality,
        dataset=slug(ref.dataset),
        case=salted_hash(salt, "case", ref.dataset, ref.case_id),
        patient=salted_hash(salt, "patient", ref.dataset, ref.patient_id),
        content_hash=case.content_hash,
    )
