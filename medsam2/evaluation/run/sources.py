"""The cases of an evaluation: from a folder of shards, or straight from a raw data set.

Shards are scored on their stored grid, which is the native one up to `max_side` of `medsam2 prepare`; raw data on its
native grid. Case and patient names stay out of what we write: both sources give salted hashes.

Legend: N objects, P label planes, T frames, C channels, H and W pixels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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
PLACES_IN_THE_SOURCE = ("split", "shard", "frame_offset", "mask_offset", "json_offset")
"""Columns of the index that say nothing about the scores of a case."""


@dataclass(frozen=True)
class CaseName:
    """A case before it is read, as it may stand in files.

    Attributes:
        key: 16 hexadecimal digits, unique in the source and the same whatever `limit` is. dataset, case: case is
            salted.
        state: a digest of what its scores depend on: image, masks, spacing, window and the files that hold them.
        size: what predicting it costs, roughly: frames times objects; 1 where only reading would tell.
    """

    key: str
    dataset: str
    case: str
    state: str
    size: int = 1


@dataclass(frozen=True)
class CaseList:
    """Cases of a source, which are read one by one.

    Attributes:
        source: the folder. grid: "stored" (shards) or "native" (raw). available: cases before `limit`.
    """

    source: str
    grid: str
    available: int
    _entries: tuple[Any, ...]
    _index: SegmentIndex | None
    _structures: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many cases there are."""
        return len(self._entries)

    def names(self) -> list[CaseName]:
        """Names of all cases, in order, without reading voxels."""
        names = _stored_names(self._index, self._entries) if self._index else map(_raw_name, self._entries)
        seen: Counter[str] = Counter()
        unique = []
        for name in names:  # a raw data set may name two cases alike
            seen[name.key] += 1
            unique.append(replace(name, key=_digest((name.key, seen[name.key]))))
        return unique

    def without_names(self, number: int, text: str) -> str:
        """`text` (an error) without the paths and names of case `number`: they may name a patient."""
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
            UserError: it cannot be read (CaseError for raw data).
        """
        entry = self._entries[number]
        case = _from_shard(self._index, entry) if self._index else _from_raw(entry)
        kept = tuple(thing for thing in case.objects if not self._structures or thing.name in self._structures)
        return replace(case, objects=kept)


def find_source(
    source: str | Path,
    split: str = "val",
    limit: int = 0,
    structures: tuple[str, ...] = (),
    layout: str | None = None,
    modality: str | None = None,
    book: SettingsBook | None = None,
) -> CaseList:
    """The cases under `source`, without reading voxels.

    Args:
        source: shards (a folder or a URL), or raw data in any layout.
        split: of a shard folder, or "all"; raw data has no splits.
        limit: cases of each data set, 0 for all: the first ones, of shards in the order of content, of raw data in that
            of names. structures: keep these objects only.
        layout, modality, book: of raw data (`medsam2.cases.layouts.find_cases`).

    Raises:
        UserError: no such folder, split, case or structure; or shards and settings of raw data.
    """
    folder = Path(source)
    url = "://" in str(source)
    if url or (folder / INDEX_FILE).is_file() or (folder.is_dir() and any(folder.glob(f"*/{INDEX_FILE}"))):
        for name, value in (("layout", layout), ("modality", modality), ("config", book)):
            if value is not None:
                raise UserError(f"data.{name} is for raw data, but {source} holds shards, which know; leave it out.")
        index = store_index(open_store(source))
        rows = _rows(index, split, structures)
        first = _first_of_each(rows, index.table["dataset"].to_pylist(), limit)
        return CaseList(str(source), "stored", len(rows), tuple(first), index, structures)
    from medsam2.cases.layouts import find_cases

    refs = find_cases(folder, layout, modality, book)
    first = _first_of_each(range(len(refs)), [ref.dataset for ref in refs], limit)
    return CaseList(str(source), "native", len(refs), tuple(refs[number] for number in first), None, structures)


def load_cases(source: str | Path | ShardStore, split: str = "val", limit: int = 0) -> list[LoadedCase]:
    """All cases of one split of a shard folder (or URL), in memory; an empty list where the split holds none."""
    index = store_index(open_store(source) if isinstance(source, str | Path) else source)
    rows = [row for row, name in enumerate(index.table["split"].to_pylist()) if name == split]
    rows = _first_of_each(rows, index.table["dataset"].to_pylist(), limit)
    return [case for case in (_from_shard(index, row) for row in rows) if case.objects]


def _rows(index: SegmentIndex, split: str, structures: tuple[str, ...]) -> list[int]:
    """Rows of the split that show one of `structures`."""
    splits = index.table["split"].to_pylist()
    known = sorted(set(splits))
    if split != ALL_SPLITS and split not in known:
        hint = did_you_mean(split, [*known, ALL_SPLITS])
        raise UserError(f"split={split}: {index.folder} has the splits {', '.join(known)}, or 'all'.{hint}")
    rows = [row for row, name in enumerate(splits) if split in (name, ALL_SPLITS)]
    if structures:
        names = {row: {entry["name"] for entry in index.table["objects"][row].as_py()} for row in rows}
        known = sorted(set().union(*names.values()))
        for name in structures:
            if name not in known:
                hint = did_you_mean(name, known)
                raise UserError(f"structures: {name!r} is not in {index.folder}; it has {', '.join(known)}.{hint}")
        rows = [row for row in rows if names[row] & set(structures)]
    if not rows:
        raise UserError(f"{index.folder}: no case in split {split!r}.")
    return rows


def _first_of_each(rows: Iterable[int], datasets: Sequence[str], limit: int) -> list[int]:
    """The first `limit` rows of each data set (all of them for 0), in order; datasets: of every row."""
    count: Counter[str] = Counter()
    first = []
    for row in rows:
        count[datasets[row]] += 1
        if not limit or count[datasets[row]] <= limit:
            first.append(row)
    return first


def _stored_names(index: SegmentIndex, rows: Iterable[int]) -> Iterator[CaseName]:
    """The state of a case is its row of the index (object tables, window, spacing, hash of the image) and its shard."""
    stated = read_summary(index.folder).get("shards")
    shards = stated if isinstance(stated, dict) else {}
    for row in rows:
        entry = index.row(row)
        content = {name: value for name, value in vars(entry).items() if name not in PLACES_IN_THE_SOURCE}
        size = len(entry.frames) * max(len(entry.objects), 1)
        yield CaseName(entry.key, entry.dataset, entry.case, _digest((content, shards.get(entry.shard))), size)


def _raw_name(ref: CaseRef) -> CaseName:
    from medsam2.shards.prepare.pseudonyms import read_salt, salted_hash, slug

    dataset, case = slug(ref.dataset), salted_hash(read_salt(), "case", ref.dataset, ref.case_id)
    inside = [sorted(path.rglob("*")) if path.is_dir() else [path] for path in ref.files]
    files = [_file_state(path) for paths in inside for path in paths]
    return CaseName(
        f"{dataset} {case}",
        dataset,
        case,
        _digest((files, ref.modality, ref.part, ref.labels, ref.spacing, ref.settings)),
    )


def _file_state(path: Path) -> tuple[str, int, int] | None:
    """Name, bytes and time of change."""
    found = path.stat() if path.exists() else None
    return found and (path.name, found.st_size, found.st_mtime_ns)


def _digest(content: Any) -> str:
    """16 hexadecimal digits of plain values and dataclasses of them."""
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
    image, _ = to_uint8(case, ref.settings.wanted_windows[0], ref.settings.percentiles)
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
