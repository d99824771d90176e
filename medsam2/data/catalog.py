"""The columns of one shard folder's index as numpy views of the memory-mapped file.

Nothing is copied a row but what a plan needs of every row; a clip's lookups cost microseconds, and workers share
the pages. Legend: R rows (segments), T frames of a segment, O objects of a segment, P label planes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from medsam2.shards.index import read_index


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
    """Where and how the members of one segment are stored; offsets and lengths in bytes, one a frame [T]."""

    key: str
    path: Path
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


class Catalog:
    """Random access to one folder's `index.arrow`.

    Pickling (workers started by spawn) stores the folder alone and maps the file again.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        table = read_index(self.folder).table
        if any(column.num_chunks != 1 for column in table.columns):
            table = table.combine_chunks()
        self._columns: dict[str, pa.Array] = {
            name: table.column(name).chunk(0) if len(table) else table.column(name).combine_chunks()
            for name in table.column_names
        }
        self._count = len(table)
        objects = self._columns["objects"]
        self.object_offsets: np.ndarray = objects.offsets.to_numpy()
        fields = objects.values
        names = fields.field("name").dictionary_encode()
        self.names: tuple[str, ...] = tuple(names.dictionary.to_pylist())
        self.name_codes: np.ndarray = names.indices.to_numpy(zero_copy_only=False)
        self._values = fields.field("value").to_numpy(zero_copy_only=False)
        self._planes = fields.field("plane").to_numpy(zero_copy_only=False)
        self._pixel_offsets, self._pixels = _lists(fields.field("pixels"))
        self._lists = {
            n: _lists(self._columns[n]) for n in ("frame_offset", "frame_length", "mask_offset", "mask_length")
        }
        self._numbers = {
            n: self._columns[n].to_numpy(zero_copy_only=False) for n in ("height", "width", "channels", "mask_planes")
        }

    def __reduce__(self) -> tuple[type[Catalog], tuple[Path]]:
        return Catalog, (self.folder,)

    def __len__(self) -> int:
        return self._count

    def text(self, column: str, row: int) -> str:
        """The string in `column` of `row`."""
        return str(self._columns[column][row].as_py())

    def texts(self, column: str, rows: np.ndarray) -> list[str]:
        """The strings in `column` of several rows."""
        taken: list[str] = self._columns[column].take(pa.array(rows)).to_pylist()
        return taken

    def codes(self, column: str) -> tuple[tuple[str, ...], np.ndarray]:
        """A string column as its distinct values and int32 codes [R]."""
        encoded = self._columns[column].dictionary_encode()
        return tuple(encoded.dictionary.to_pylist()), encoded.indices.to_numpy(zero_copy_only=False)

    def num_frames(self, row: int) -> int:
        """T of a segment."""
        offsets = self._lists["frame_offset"][0]
        return int(offsets[row + 1] - offsets[row])

    @cached_property
    def frame_counts(self) -> np.ndarray:
        """int [R]: T of every segment."""
        return np.diff(self._lists["frame_offset"][0])

    def peaks(self) -> np.ndarray:
        """The largest pixel count over frames of every object of the index [sum of O]."""
        starts = self._pixel_offsets[:-1]
        if not len(starts):
            return np.zeros(0, np.int32)
        return np.maximum.reduceat(self._pixels, starts)

    def objects(self, row: int) -> ObjectRows:
        """The object tables of a segment, as views."""
        first, last = int(self.object_offsets[row]), int(self.object_offsets[row + 1])
        pixels = self._pixels[self._pixel_offsets[first] : self._pixel_offsets[last]]
        return ObjectRows(
            names=self.name_codes[first:last],
            pixels=pixels.reshape(last - first, self.num_frames(row)),
            values=self._values[first:last],
            planes=self._planes[first:last],
        )

    def location(self, row: int) -> Location:
        """Where the members of a segment are."""
        lists: dict[str, Any] = {
            n: values[offsets[row] : offsets[row + 1]] for n, (offsets, values) in self._lists.items()
        }
        numbers: dict[str, Any] = {name: int(values[row]) for name, values in self._numbers.items()}
        return Location(
            key=self.text("key", row),
            path=self.folder / self.text("shard", row),
            mask_dtype=self.text("mask_dtype", row),
            codec=self.text("codec", row),
            mask_codec=self.text("mask_codec", row),
            **numbers,
            **lists,
        )


def _lists(array: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """A list column as (offsets [R + 1], flat values)."""
    return array.offsets.to_numpy(), array.values.to_numpy(zero_copy_only=False)
