"""The columns of a shard folder's index as numpy views of the memory-mapped file.

The columns are not copied: the memory of a process hardly grows with the index, workers share its pages, and looking
up a clip takes microseconds.
Legend: R rows (segments), T frames of a segment, O objects of a segment, P label planes.
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

MAX_CACHED_TEXTS = 4096
"""A column with more distinct texts makes its Python strings on demand."""
ROWS_PER_CHUNK = 1 << 16
"""Number of rows whose keys are in memory at once while they are hashed."""


@dataclass(frozen=True)
class ObjectRows:
    """The objects of one segment.

    Attributes:
        names: int32 [O], index of each structure's name in `Catalog.names`.
        pixels: [O, T], number of pixels of each object on each frame.
        values, planes: [O], the value of each object in its label plane, and the index of that plane.
    """

    names: np.ndarray
    pixels: np.ndarray
    values: np.ndarray
    planes: np.ndarray


@dataclass(frozen=True)
class Location:
    """Where and how the frames and label planes of one segment are stored.

    Attributes:
        shard: file name of the tar.
        frame_offset, frame_length, mask_offset, mask_length: [T], in bytes from the start of the tar.
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
    """A string column that creates Python strings on demand.

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
        """Return a SHA-256 of the texts of some rows, in this order."""
        digest = hashlib.sha256()
        for start in range(0, len(rows), ROWS_PER_CHUNK):
            chunk = np.ascontiguousarray(rows[start : start + ROWS_PER_CHUNK], np.int64)
            texts = self._array.take(pa.Array.from_buffers(pa.int64(), len(chunk), [None, pa.py_buffer(chunk)]))
            offsets = np.frombuffer(texts.buffers()[1], np.int32)[: len(texts) + 1]
            digest.update(np.diff(offsets).astype("<i4").data)
            digest.update(memoryview(texts.buffers()[2] or b"")[: offsets[-1]])
        return digest.hexdigest()


class Catalog:
    """Random access to a folder's `index.arrow`. Pickling keeps the store alone: a spawned worker maps the file again.

    Args:
        store: the shards; a path is a local folder.

    Attributes:
        names: the structure names.
        name_codes: int32 [sum of O], index in `names` of each object of the index.
        object_offsets: int32 [R + 1], the first object of each row.
        peaks: int32 [sum of O], each object's number of pixels on its largest frame.

    Raises:
        UserError: the index is missing or damaged. Damage within one row is reported when that row is read.
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
        objects = self._columns["objects"].values
        self.object_offsets: np.ndarray = _view(self._columns["objects"].offsets)
        _check_ascending(self.object_offsets)
        names, self.name_codes = _coded(objects.field("name"))
        self.names: tuple[str, ...] = tuple(names)
        self.peaks, self._values, self._planes = (_view(objects.field(n)) for n in (PEAK_COLUMN, "value", "plane"))
        self._pixel_offsets, self._pixels = _lists(objects.field("pixels"))
        lists = [_lists(self._columns[n]) for n in ("frame_offset", "frame_length", "mask_offset", "mask_length")]
        self._frame_offsets = lists[0][0]
        self._keys = Texts(self._columns["key"])
        # `location` indexes memoryviews: reading one number takes half as long as with numpy.
        self._members = [(offsets.data, values) for offsets, values in lists]
        self._sizes = [_view(self._columns[n]).data for n in ("height", "width", "channels", "mask_planes")]
        coded = [self.codes(n) for n in ("shard", "mask_dtype", "codec", "mask_codec")]
        self._storage_columns = [(values, codes.data) for values, codes in coded]

    def __reduce__(self) -> tuple[type[Catalog], tuple[ShardStore]]:
        return Catalog, (self.store,)

    def __len__(self) -> int:
        return self._count

    @property
    def name(self) -> str:
        """The last part of the folder's path or URL, as "folder:dataset" patterns use it."""
        return self.store.path.rsplit("/", 1)[-1] if self.store.remote else self.folder.resolve().name

    def text(self, column: str, row: int) -> str:
        """Return the string in a column of a row."""
        if column == "key":
            return self._keys[row]
        values, codes = self.codes(column)
        return values[int(codes[row])]

    def distinct(self, column: str, rows: np.ndarray) -> list[str]:
        """Return the sorted distinct strings of several rows in a column other than `key`."""
        values, codes = self.codes(column)
        return sorted({values[code] for code in np.unique(codes[rows]).tolist()})

    def codes(self, column: str) -> tuple[Sequence[str], np.ndarray]:
        """Return a string column other than `key` as distinct values and codes int32 [R], a view of the file.

        Raises:
            UserError: the column is damaged.
        """
        if column not in self._codes:
            try:
                self._codes[column] = _coded(self._columns[column])
            except (pa.ArrowException, ValueError) as error:
                raise self._damaged(f"{column}: {error}") from None
        return self._codes[column]

    def digest(self, rows: np.ndarray) -> str:
        """Return a SHA-256 of the keys of some rows, in this order; it is equal if the segments are."""
        return self._keys.digest(rows)

    def num_frames(self, row: int) -> int:
        """Return T of a segment."""
        offsets = self._members[0][0]
        return offsets[row + 1] - offsets[row]

    @cached_property
    def frame_counts(self) -> np.ndarray:
        """int32 [R]: T of every segment."""
        return np.diff(self._frame_offsets)

    def objects(self, row: int) -> ObjectRows:
        """Return the objects of a segment, as views of the index.

        Raises:
            UserError: the number of pixel counts is not that of objects times frames.
        """
        first, last = self.object_offsets[row : row + 2].tolist()
        pixels = self._pixels[self._pixel_offsets[first] : self._pixel_offsets[last]]
        try:
            pixels = pixels.reshape(last - first, self.num_frames(row))
        except ValueError:
            raise self._damaged(f"row {row} does not have a pixel count for each object and frame") from None
        return ObjectRows(self.name_codes[first:last], pixels, self._values[first:last], self._planes[first:last])

    def location(self, row: int) -> Location:
        """Return where the frames and label planes of a segment are stored."""
        sizes = [column[row] for column in self._sizes]
        shard, mask_dtype, codec, mask_codec = [values[codes[row]] for values, codes in self._storage_columns]
        members = [values[offsets[row] : offsets[row + 1]] for offsets, values in self._members]
        fields: tuple[Any, ...] = (self._keys[row], shard, *sizes, mask_dtype, codec, mask_codec, *members)
        return Location(*fields)

    @staticmethod
    def check_patients(catalogs: Sequence[Catalog]) -> None:
        """Check that no patient is in different splits of different shard folders.

        Raises:
            UserError: a patient is; the message gives the pseudonym and both folders.
        """
        first_seen: dict[str, tuple[str, Catalog]] = {}
        for catalog in catalogs if len(catalogs) > 1 else ():
            (patients, patient_codes), (splits, split_codes) = catalog.codes("patient"), catalog.codes("split")
            for pair in np.unique(patient_codes.astype(np.int64) * len(splits) + split_codes).tolist():
                patient, split = patients[pair // len(splits)], splits[pair % len(splits)]
                other_split, other = first_seen.setdefault(patient, (split, catalog))
                if other_split != split and other is not catalog:
                    raise UserError(
                        f"data.shards: patient {patient} is in {other_split} of {other.store.path} and in {split} of "
                        f"{catalog.store.path}; take the patient out of one of them, e.g. `medsam2 prepare --out "
                        f"{catalog.store.path} --remove-patient {patient}`, or prepare it again with a --split-file."
                    )

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self.folder / INDEX_FILE}: damaged ({reason}); prepare the shards again.")


def _view(array: pa.Array) -> np.ndarray:
    """Return a numeric column as a view. `pyarrow.Array.to_numpy` imports pandas, which takes 0.3 s and memory."""
    if array.null_count:
        raise ValueError(f"{array.null_count} numbers are missing")
    dtype = np.dtype(array.type.to_pandas_dtype())
    if not len(array):
        return np.zeros(0, dtype)
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def _coded(array: pa.DictionaryArray) -> tuple[Sequence[str], np.ndarray]:
    """Return the distinct values and the codes [R] of a column. Up to `MAX_CACHED_TEXTS` values are a tuple."""
    values, codes = Texts(array.dictionary), _view(array.indices)
    if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < len(values):
        raise ValueError(f"codes outside of the {len(values)} texts")
    return (tuple(values) if len(values) <= MAX_CACHED_TEXTS else values), codes


def _lists(array: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Return a list column as offsets [R + 1] and flat values."""
    offsets = _view(array.offsets)
    _check_ascending(offsets)
    return offsets, _view(array.values)


def _check_ascending(offsets: np.ndarray) -> None:
    """Raise ValueError if offsets descend: Arrow validates only the first and last, and `take` could read anywhere."""
    if (offsets[1:] < offsets[:-1]).any():
        raise ValueError("offsets that do not ascend")
