"""The cases of an evaluation: from a folder of shards, or straight from a raw data set.

Shards are scored on their stored grid, which is the native one up to `max_side` of `medsam2 prepare`; raw data on its
native grid. Case and patient names stay out of what we write: both sources give salted hashes.

Legend: N objects, P label planes, T frames, C channels, H and W pixels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from medsam2.data.cache_settings import CacheSettings
from medsam2.data.store import ShardStore, open_store, store_index
from medsam2.errors import UserError, did_you_mean
from medsam2.shards.index import ARROW, SegmentIndex

if TYPE_CHECKING:
    from medsam2.cases.settings import SettingsBook

ALL_SPLITS = "all"


@dataclass(frozen=True)
class CaseObject:
    """One object: where label plane `plane` has the value `value`."""

    name: str
    plane: int
    value: int


@dataclass(frozen=True, eq=False)
class LoadedCase:
    """A whole case in memory, ready for prediction and scoring.

    Attributes:
        frames: uint8 [T, C, H, W], C = 1 or 3. planes: integer label planes [P, T, H, W].
        objects: N objects, each on at least one frame.
        spacing: (z or t, y, x) of this grid; mm for volumes. kind: volume, clip or still.
        case, patient: salted hashes. content_hash: of the native image, for the leak check.
    """

    frames: Tensor
    planes: np.ndarray
    objects: tuple[CaseObject, ...]
    spacing: tuple[float, float, float]
    kind: str
    modality: str
    dataset: str
    case: str
    patient: str
    content_hash: str = ""

    def mask(self, index: int) -> np.ndarray:
        """bool [T, H, W] of object `index`."""
        found = self.objects[index]
        return np.asarray(self.planes[found.plane] == found.value)


@dataclass(frozen=True)
class CaseName:
    """A case before it is read, as it may stand in files.

    Attributes:
        key: a file name, unique within the source and the same whatever `limit` is. dataset, case: case is salted.
        state: changes when the case's files do (its content hash, or their sizes and times).
        size: what predicting it costs, roughly: frames times objects; 1 where only reading would tell.
    """

    key: str
    dataset: str
    case: str
    state: str
    size: int = 1


@dataclass(frozen=True)
class CaseList:
    """Cases that were found and are read one by one.

    Attributes:
        count: how many there are. source: the folder. grid: "stored" (shards) or "native" (raw).
    """

    count: int
    source: str
    grid: str
    _entries: tuple[Any, ...]
    _index: SegmentIndex | None
    _structures: tuple[str, ...]

    def names(self) -> list[CaseName]:
        """Names of all cases, in order, without reading voxels."""
        found = [_shard_name(self._index, entry) if self._index else _raw_name(entry) for entry in self._entries]
        seen: Counter[str] = Counter()
        unique = []
        for name in found:  # a raw data set may name two cases alike
            seen[name.key] += 1
            unique.append(name if seen[name.key] == 1 else replace(name, key=f"{name.key}-{seen[name.key]}"))
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
        return _keep(_from_shard(self._index, entry) if self._index else _from_raw(entry), self._structures)


def find_source(
    source: str | Path,
    split: str = "val",
    limit: int = 0,
    structures: tuple[str, ...] = (),
    layout: str | None = None,
    modality: str | None = None,
    book: SettingsBook | None = None,
    cache: CacheSettings | None = None,
) -> CaseList:
    """The cases under `source`, without reading voxels.

    Args:
        source: shards (a folder or a URL), or raw data in any layout.
        split: of a shard folder, or "all"; raw data has no splits.
        limit: cases of each data set, 0 for all. structures: keep these objects only.
        layout, modality, book: of raw data (`medsam2.cases.layouts.find_cases`).
        cache: how shards behind a URL are read.

    Raises:
        UserError: no such folder, split, case or structure; or shards and settings of raw data.
    """
    folder = Path(source)
    url = "://" in str(source)
    if url or (folder / ARROW).is_file() or (folder.is_dir() and any(folder.glob(f"*/{ARROW}"))):
        given = {"layout": layout, "modality": modality, "config": book}
        if said := [name for name, value in given.items() if value is not None]:
            raise UserError(f"data.{said[0]} is for raw data, but {source} holds shards, which know; leave it out.")
        index = open_index(source, cache)
        rows = _rows(index, split, structures)
        chosen = _first_of_each([(str(index.table["dataset"][row]), row) for row in rows], limit)
        return CaseList(len(chosen), str(source), "stored", tuple(chosen), index, structures)
    from medsam2.cases.layouts import find_cases

    refs = find_cases(folder, layout, modality, book)
    chosen_refs = _first_of_each([(ref.dataset, ref) for ref in refs], limit)
    return CaseList(len(chosen_refs), str(source), "native", tuple(chosen_refs), None, structures)


def open_index(source: str | Path | ShardStore, cache: CacheSettings | None = None) -> SegmentIndex:
    """The index of a shard folder, or of one behind a URL, which is read as `cache` says (by default, whole shards).

    Raises:
        UserError: no index, or not a readable one.
    """
    return store_index(open_store(source, cache or CacheSettings()) if isinstance(source, str | Path) else source)


def load_cases(
    source: str | Path | ShardStore, split: str = "val", limit: int = 0, cache: CacheSettings | None = None
) -> list[LoadedCase]:
    """All cases of one split of a shard folder (or URL), in memory; an empty list where the split holds none."""
    index = open_index(source, cache)
    rows = [row for row, name in enumerate(index.table["split"].to_pylist()) if name == split]
    chosen = _first_of_each([(str(index.table["dataset"][row]), row) for row in rows], limit)
    return [case for case in (_from_shard(index, row) for row in chosen) if case.objects]


def _rows(index: SegmentIndex, split: str, structures: tuple[str, ...]) -> list[int]:
    """Rows of the split that show one of `structures`."""
    splits = index.table["split"].to_pylist()
    known = sorted(set(splits))
    if split != ALL_SPLITS and split not in known:
        hint = did_you_mean(split, [*known, ALL_SPLITS])
        raise UserError(f"split={split}: {index.folder} has the splits {', '.join(known)}, or 'all'.{hint}")
    rows = [row for row, name in enumerate(splits) if split in (name, ALL_SPLITS)]
    if structures:
        names = {row: {found["name"] for found in index.table["objects"][row].as_py()} for row in rows}
        every = sorted(set().union(*names.values())) if names else []
        for wanted in structures:
            if wanted not in every:
                hint = did_you_mean(wanted, every)
                raise UserError(f"structures: {wanted!r} is not in {index.folder}; found {', '.join(every)}.{hint}")
        rows = [row for row in rows if names[row] & set(structures)]
    if not rows:
        raise UserError(f"{index.folder}: no case in split {split!r}.")
    return rows


def _first_of_each(entries: list[tuple[str, Any]], limit: int) -> list[Any]:
    """The first `limit` entries of each data set, in order."""
    seen: Counter[str] = Counter()
    chosen: list[Any] = []
    for dataset, entry in entries:
        seen[dataset] += 1
        if not limit or seen[dataset] <= limit:
            chosen.append(entry)
    return chosen


def _keep(case: LoadedCase, structures: tuple[str, ...]) -> LoadedCase:
    """Only the objects that are wanted."""
    if not structures:
        return case
    return replace(case, objects=tuple(found for found in case.objects if found.name in structures))


def _shard_name(index: SegmentIndex, row: int) -> CaseName:
    entry = index.row(row)
    cost = len(entry.frames) * max(len(entry.objects), 1)
    return CaseName(_file_name(entry.key), entry.dataset, entry.case, entry.content_hash, cost)


def _raw_name(ref: Any) -> CaseName:
    from medsam2.shards.identity import read_salt, salted, slug

    dataset, case = slug(ref.dataset), salted(read_salt(), "case", ref.dataset, ref.case_id)
    states = [(file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else None for file in ref.files]
    state = hashlib.sha256(repr((states, ref.part, ref.labels, ref.spacing)).encode()).hexdigest()[:16]
    return CaseName(_file_name(f"{dataset}-{case}"), dataset, case, state)


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in text)


def _from_shard(index: SegmentIndex, row: int) -> LoadedCase:
    from medsam2.shards.load import load_segment, stored_spacing

    entry, image, planes = load_segment(index, row)
    objects = tuple(CaseObject(o.name, o.plane, o.value) for o in entry.objects if max(o.pixels, default=0))
    return LoadedCase(
        frames=_channels_first(image),
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


def _from_raw(ref: object) -> LoadedCase:
    from medsam2.cases.case import CaseRef
    from medsam2.cases.intensity import to_uint8
    from medsam2.cases.layouts import load_case
    from medsam2.shards.identity import read_salt, salted, slug

    assert isinstance(ref, CaseRef)
    case, salt = load_case(ref), read_salt()
    image, _ = to_uint8(case, ref.settings.wanted_windows[0], ref.settings.percentiles)
    return LoadedCase(
        frames=_channels_first(image),
        planes=case.planes,
        objects=tuple(
            CaseObject(label.name, label.plane, label.id)
            for label in case.labels
            if (case.planes[label.plane] == label.id).any()
        ),
        spacing=case.spacing,
        kind=case.kind,
        modality=case.modality,
        dataset=slug(ref.dataset),
        case=salted(salt, "case", ref.dataset, ref.case_id),
        patient=salted(salt, "patient", ref.dataset, ref.patient_id),
        content_hash=case.content_hash,
    )


def _channels_first(image: np.ndarray) -> Tensor:
    """uint8 [T, H, W] or [T, H, W, 3] to [T, C, H, W]."""
    frames = torch.from_numpy(np.require(image, requirements=["C", "W"]))  # torch wants to own what it may write
    return frames[:, None] if frames.ndim == 3 else frames.permute(0, 3, 1, 2).contiguous()
