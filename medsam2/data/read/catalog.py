"""The columns of one shard folder's index as numpy views of the memory-mapped file.

Nothing of a row is copied, so a rank's own memory hardly grows with the index and workers share its pages; the lookups
of one clip cost microseconds. Legend: R rows (segments), T frames of a segment, O objects of a segment, P label planes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from medsam2.data.read.store import LocalStore, ShardStore
from medsam2.errors import UserError
from medsam2.shards.index import INDEX_FILE, PEAK_COLUMN, read_index

MAX_KEPT_TEXTS = 4096
"""Distinct texts of a column that are worth keeping as Python strings."""
ROWS_PER_CHUNK = 1 << 16
"""Rows whose keys are gathered at a time."""


@dataclass(frozen=True)
class ObjectRows:
    """The objects of one segment.

    names: code of the structure's name [O] (see `Catalog.names`). pixels: pixel counts [O, T].
    values, planes: the value [O] of each object in its label plane [O].
    """

    names: np.ndarray
    pixels: np.ndarray
    values: np.ndarray
    planes: np.ndarray


@dataclass(frozen=True)
class Location:
    """Where and how the members of one segment are stored; offsets and lengths in bytes, one a frame [T].

    shard: the tar's name, by which a store reads from it.
    """

    key: str
    shard: str
    height: int
    width: int
    channels: int
    mask_planes: int
    mask_dtype: str
    codec: str
    mask_codec: str
    frame_offset: np.ndarray
    frame_length: np.ndarray
    mask_offset: np.ndarray
    mask_length: np.ndarray


class Texts(Sequence[str]):
    """A string column that makes a Python string only of what is asked for.

    Raises:
        ValueError: the column is damaged: its offsets do not ascend, or texts are missing.
    """

    def __init__(self, array: pa.StringArray) -> None:
        self._array = array
        if len(array):
            _check_ascending(np.frombuffer(array.buffers()[1], np.int32, len(array) + 1, 4 * array.offset))
        if array.null_count:
            raise ValueError(f"{array.null_count} texts are missing")

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return str(self._array[index].as_py())

    def digest(self, rows: np.ndarray) -> str:
        """A hash of the texts of these rows in their order."""
        found = hashlib.sha256()
        for start in range(0, len(rows), ROWS_PER_CHUNK):
            # gathered in chunks, so that a million keys are never in memory together
            part = np.ascontiguousarray(rows[start : start + ROWS_PER_CHUNK], np.int64)
            taken = self._array.take(pa.Array.from_buffers(pa.int64(), len(part), [None, pa.py_buffer(part)]))
            offsets = np.frombuffer(taken.buffers()[1], np.int32)[: len(taken) + 1]
            found.update(np.diff(offsets).astype("<i4").data)
            found.update(memoryview(taken.buffers()[2] or b"")[: offsets[-1]])
        return found.hexdigest()


class Catalog:
    """Random access to one folder's `index.arrow`.

    Pickling (workers started by spawn) keeps the store and maps the file again.

    Args:
        store: where the shards are; a path is a folder of this machine.

    Attributes:
        peaks: int32 [sum of O], the largest pixel count over the frames of every object of the index, a view of it.

    Raises:
        UserError: the index is missing or damaged. What only shows in one row is found when that row is asked for.
    """

    def __init__(self, store: ShardStore | Path | str) -> None:
        self.store: ShardStore = LocalStore(store) if isinstance(store, str | Path) else store
        self.folder = self.store.index_folder
        table = read_index(self.folder).table
        self._columns: dict[str, pa.Array] = {name: table.column(name).chunk(0) for name in table.column_names}
        self._count = len(table)
        self._codes: dict[str, tuple[Sequence[str], np.ndarray]] = {}
        try:
            self._open()
        except (pa.ArrowException, ValueError) as error:
            raise self._damaged(str(error)) from None

    def _open(self) -> None:
        objects = self._columns["objects"]
        found = objects.values
        self.object_offsets: np.ndarray = _view(objects.offsets)
        _check_ascending(self.object_offsets)
        names, self.name_codes = _coded(found.field("name"))
        self.names: tuple[str, ...] = tuple(names)
        self.peaks, self._values, self._planes = (_view(found.field(n)) for n in (PEAK_COLUMN, "value", "plane"))
        self._pixel_offsets, self._pixels = _lists(found.field("pixels"))
        lists = {n: _lists(self._columns[n]) for n in ("frame_offset", "frame_length", "mask_offset", "mask_length")}
        self._frame_offsets = lists["frame_offset"][0]
        self._keys = Texts(self._columns["key"])
        # for `location`: a memoryview gives one number in half of numpy's time
        self._members = [(offsets.data, values) for offsets, values in lists.values()]
        self._sizes = [_view(self._columns[n]).data for n in ("height", "width", "channels", "mask_planes")]
        coded = [self.codes(n) for n in ("shard", "mask_dtype", "codec", "mask_codec")]
        self._stored_as = [(values, codes.data) for values, codes in coded]

    def __reduce__(self) -> tuple[type[Catalog], tuple[ShardStore]]:
        return Catalog, (self.store,)

    def __len__(self) -> int:
        return self._count

    @property
    def name(self) -> str:
        """The last part of the folder's path or URL: what "folder:dataset" patterns go by."""
        return self.store.shown.rsplit("/", 1)[-1] if self.store.remote else self.folder.resolve().name

    def text(self, column: str, row: int) -> str:
        """The string in `column` of `row`."""
        if column == "key":
            return self._keys[row]
        values, codes = self.codes(column)
        return values[int(codes[row])]

    def distinct(self, column: str, rows: np.ndarray) -> list[str]:
        """The different strings in `column` (not `key`) of several rows, sorted."""
        values, codes = self.codes(column)
        return sorted({values[code] for code in np.unique(codes[rows]).tolist()})

    def codes(self, column: str) -> tuple[Sequence[str], np.ndarray]:
        """A string column other than `key` as its distinct values and int32 codes [R], a view of the file."""
        if column not in self._codes:
            try:
                self._codes[column] = _coded(self._columns[column])
            except (pa.ArrowException, ValueError) as error:
                raise self._damaged(f"{column}: {error}") from None
        return self._codes[column]

    def digest(self, rows: np.ndarray) -> str:
        """A hash of the keys of these rows in their order: equal where they are the same segments."""
        return self._keys.digest(rows)

    def num_frames(self, row: int) -> int:
        """T of a segment."""
        offsets = self._members[0][0]
        return offsets[row + 1] - offsets[row]

    @cached_property
    def frame_counts(self) -> np.ndarray:
        """int32 [R]: T of every segment."""
        return np.diff(self._frame_offsets)

    def objects(self, row: int) -> ObjectRows:
        """The object tables of a segment, as views.

        Raises:
            UserError: they do not have a pixel count for each frame.
        """
        first, last = self.object_offsets[row : row + 2].tolist()
        pixels = self._pixels[self._pixel_offsets[first] : self._pixel_offsets[last]]
        try:
            pixels = pixels.reshape(last - first, self.num_frames(row))
        except ValueError:
            raise self._damaged(f"row {row} does not have a pixel count for each object and frame") from None
        return ObjectRows(self.name_codes[first:last], pixels, self._values[first:last], self._planes[first:last])

    def location(self, row: int) -> Location:
        """Where the members of a segment are."""
        sizes = [column[row] for column in self._sizes]
        shard, mask_dtype, codec, mask_codec = [values[codes[row]] for values, codes in self._stored_as]
        members = [values[offsets[row] : offsets[row + 1]] for offsets, values in self._members]
        fields: tuple[Any, ...] = (self._keys[row], shard, *sizes, mask_dtype, codec, mask_codec, *members)
        return Location(*fields)

    @staticmethod
    def check_patients(catalogs: Sequence[Catalog]) -> None:
        """Refuse folders of shards that have a patient in different splits.

        Raises:
            UserError: with the salted id of such a patient.
        """
        homes: dict[str, tuple[str, Catalog]] = {}
        for catalog in catalogs if len(catalogs) > 1 else ():
            (patients, patient_codes), (splits, split_codes) = catalog.codes("patient"), catalog.codes("split")
            for pair in np.unique(patient_codes.astype(np.int64) * len(splits) + split_codes).tolist():
                patient, split = patients[pair // len(splits)], splits[pair % len(splits)]
                there, other = homes.setdefault(patient, (split, catalog))
                if there != split and other is not catalog:
                    raise UserError(
                        f"data.shards: patient {patient} is in {there} of {other.store.shown} and in {split} of "
                        f"{catalog.store.shown}; take the patient out of one of them, e.g. `medsam2 prepare --out "
                        f"{catalog.store.shown} --remove-patient {patient}`, or prepare it again with a --split-file."
                    )

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self.folder / INDEX_FILE}: damaged ({reason}); prepare the shards again.")


def _view(array: pa.Array) -> np.ndarray:
    """A column of numbers as a view. Arrow's `to_numpy` would do, but imports pandas: 0.3 s and its memory."""
    if array.null_count:
        raise ValueError(f"{array.null_count} numbers are missing")
    kind = np.dtype(array.type.to_pandas_dtype())
    if not len(array):
        return np.zeros(0, kind)
    return np.frombuffer(array.buffers()[1], kind, len(array), array.offset * kind.itemsize)


def _coded(array: pa.DictionaryArray) -> tuple[Sequence[str], np.ndarray]:
    """The distinct values and the codes [R] of a column; a tuple of a few values, since those are asked for often."""
    values, codes = Texts(array.dictionary), _view(array.indices)
    if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < len(values):
        raise ValueError(f"codes beyond the {len(values)} texts that they stand for")
    return (tuple(values) if len(values) <= MAX_KEPT_TEXTS else values), codes


def _lists(array: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """A list column as (offsets [R + 1], flat values)."""
    offsets = _view(array.offsets)
    _check_ascending(offsets)
    return offsets, _view(array.values)


def _check_ascending(offsets: np.ndarray) -> None:
    """Arrow's quick check looks at the ends alone, and `take` would read wherever the others point to."""
    if (offsets[1:] < offsets[:-1]).any():
        raise ValueError("offsets that do not ascend")
