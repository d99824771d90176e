"""`index.arrow`, memory-mapped: one row per segment with the offsets of its members; and `index.json`, for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsam2.errors import UserError, did_you_mean
from medsam2.files import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa

INDEX_FILE, SUMMARY_FILE = "index.arrow", "index.json"
PEAK_COLUMN = "peak"  # of an object; indexes of earlier versions lack it


@dataclass(frozen=True)
class ObjectRow:
    """One object of a segment: `pixels` has T counts, `boxes` 4 T coordinates (x0, y0, x1, y1; zeros if absent).

    `lines` has five numbers per RECIST measurement: frame within the segment, x0, y0, x1, y1.
    """

    name: str
    value: int
    plane: int
    pixels: list[int]
    boxes: list[int]
    lines: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class IndexRow:
    """One segment. Offsets and lengths are in bytes of `shard`; for the other columns see `SegmentRecord`."""

    key: str
    dataset: str
    split: str
    case: str
    patient: str
    content_hash: str
    modality: str
    kind: str
    frames: list[int]
    height: int
    width: int
    channels: int
    mask_planes: int
    mask_dtype: str
    spacing: list[float]
    scale: list[float]
    codec: str
    mask_codec: str
    window: str
    original_shape: list[int]
    objects: list[ObjectRow]
    shard: str
    frame_offset: list[int]
    frame_length: list[int]
    mask_offset: list[int]
    mask_length: list[int]
    json_offset: int
    json_length: int

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """[H, W] of a grey frame, [H, W, 3] of a colour one."""
        size = (self.height, self.width)
        return size if self.channels == 1 else (*size, 3)


def schema() -> pa.Schema:
    """The columns of `index.arrow`.

    Repeated strings are dictionary-encoded (int32), and every object has a `peak`, its largest pixel count. A plan over
    a million segments then reads the memory-mapped file and needs no further tables.
    """
    import pyarrow as pa

    i32, i64 = pa.int32(), pa.int64()
    encoded = pa.dictionary(i32, pa.string())
    objects = pa.struct(
        [("name", encoded), ("value", i32), ("plane", i32), (PEAK_COLUMN, i32), ("pixels", pa.list_(i32)),
         ("boxes", pa.list_(i32)), ("lines", pa.list_(pa.float32()))]
    )  # fmt: skip
    kinds = {
        "str": encoded,
        "list[int]": pa.list_(i32),
        "list[float]": pa.list_(pa.float64()),
        "int": i32,
        "list[ObjectRow]": pa.list_(objects),
    }
    others = {
        "key": pa.string(), "frame_offset": pa.list_(i64), "mask_offset": pa.list_(i64), "json_offset": i64,
    }  # fmt: skip
    return pa.schema([(f.name, others.get(f.name, kinds[str(f.type)])) for f in fields(IndexRow)])


class SegmentIndex:
    """The segments of a folder of shards. Pickles without the table, so that workers map the file themselves.

    Args:
        folder: the folder of `index.arrow`.
        read: reads (shard name, offset, length) where shards are not in `folder`.
    """

    def __init__(self, folder: Path, read: Callable[[str, int, int], bytes] | None = None) -> None:
        self.folder = Path(folder)
        self._read = read

    def read(self, shard: str, offset: int, length: int) -> bytes:
        """Read `length` bytes of a shard, or fewer at its end.

        Raises:
            OSError: the shard does not exist or cannot be read.
            UserError: a remote shard cannot be read, or its name leads out of the folder.
        """
        if self._read is not None:
            return self._read(shard, offset, length)
        with open(self.folder / require_plain_name(shard), "rb") as file:
            file.seek(offset)
            return file.read(length)

    @cached_property
    def table(self) -> pa.Table:
        """All rows, memory-mapped: nothing is copied, and processes share the pages.

        Raises:
            UserError: the file is damaged (only the structure is checked, not every value).
        """
        import pyarrow as pa

        path = self.folder / INDEX_FILE
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
            table.validate()
            missing = [name for name in schema().names if name not in table.column_names]
            if missing:
                raise UserError(f"{path}: lacks the columns {', '.join(missing)}; prepare the shards again.")
            return table if _has_schema(table) else _to_schema(table)
        except (pa.ArrowException, ValueError, KeyError, IndexError, OSError) as error:
            raise UserError(f"{path}: not a readable index ({error}); prepare the shards again.") from None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_read": self._read}

    def row(self, index: int) -> IndexRow:
        """Read segment `index`; a negative one counts from the end."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"row {index} of {count} segments")
        values = self.table.slice(index % count, 1).to_pylist()[0]
        names = [f.name for f in fields(ObjectRow)]
        values["objects"] = [ObjectRow(**{name: obj[name] for name in names}) for obj in values["objects"]]
        return IndexRow(**{f.name: values[f.name] for f in fields(IndexRow)})


def read_index(folder: Path | str, read: Callable[[str, int, int], bytes] | None = None) -> SegmentIndex:
    """Open the index of a folder of shards; `read` as in `SegmentIndex`.

    Raises:
        UserError: the folder or its index is missing, or the index is not readable.
    """
    folder = Path(folder)
    if not (folder / INDEX_FILE).is_file():
        if not folder.is_dir():
            parent = folder.absolute().parent
            names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
            raise UserError(f"{folder}: no such folder of shards.{did_you_mean(folder.name, names)}")
        inside = sorted(p.parent for p in folder.glob(f"*/{INDEX_FILE}"))
        hint = f" Did you mean {str(inside[0])!r}?" if inside else ""
        raise UserError(f"{folder}: holds no {INDEX_FILE}; make shards with `medsam2 prepare`.{hint}")
    index = SegmentIndex(folder, read)
    index.table  # noqa: B018  # opened here, so that a damaged index is reported at once
    return index


def require_plain_name(shard: str) -> str:
    """Return `shard` if it is the plain name of a tar; an index from elsewhere may hold any path.

    Raises:
        UserError: it is a path, hidden, or not a tar.
    """
    if not shard.endswith(".tar") or shard.startswith(".") or not shard.isprintable() or set(shard) & set("/\\"):
        raise UserError(
            f"the index names {shard!r} as a shard, which is not the plain name of a .tar file; do not use it."
        )
    return shard


def read_summary(folder: Path) -> dict[str, Any]:
    """Read `index.json`; empty if it cannot be read, since shards can be used without it."""
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def check_shards(folder: Path, shards: Iterable[str], entries: Mapping[str, Any]) -> Iterator[str]:
    """Yield problems of local shards without reading them: missing files, and sizes that differ from `index.json`.

    Args:
        entries: the "shards" of `index.json`.
    """
    for shard in sorted(shards):
        file = folder / shard
        if Path(shard).name != shard:
            yield f"{shard}: the index names a file outside its folder; get the shards from their author again."
        elif not file.is_file():
            yield f"{file}: missing; copy it again, or prepare again."
        elif shard in entries and (size := file.stat().st_size) != (expected := entries[shard]["bytes"]):
            yield f"{file}: {size} bytes, expected {expected}; copy it again, or prepare again."


def write_index(folder: Path, rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Publish the index atomically: `index.json` first, `index.arrow` last."""
    import pyarrow as pa

    table = _to_schema(pa.Table.from_pylist(list(rows), schema=schema()))
    with atomic_write(folder / SUMMARY_FILE, "w") as file:
        json.dump(summary, file, indent=1, sort_keys=True)
        file.write("\n")
    write_table(folder, table)


def write_table(folder: Path, table: pa.Table) -> None:
    """Publish `index.arrow` from a table of `schema`, as one batch, so that readers need not copy columns."""
    import pyarrow as pa

    with atomic_write(folder / INDEX_FILE) as file, pa.ipc.new_file(file, schema()) as writer:
        writer.write_table(table.combine_chunks())


def _has_schema(table: pa.Table) -> bool:
    return bool(table.schema.equals(schema())) and all(column.num_chunks == 1 for column in table.columns)


def _to_schema(table: pa.Table) -> pa.Table:
    """Convert a table to `schema`, one chunk per column; dictionaries are sorted, so that codes sort like strings.

    Indexes of earlier versions and other tools have plain strings and no peaks.
    """
    import pyarrow as pa

    arrays = []
    for target in schema():
        column = table.column(target.name).combine_chunks()
        array = column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks)
        if target.name == "objects":
            array = _convert_objects(array)
        elif pa.types.is_dictionary(target.type):
            array = _encode_strings(array)
        arrays.append(array.cast(target.type))
    return pa.Table.from_arrays(arrays, schema=schema())


def _convert_objects(objects: pa.ListArray) -> pa.ListArray:
    """Encode the names of the objects and add their peaks."""
    import pyarrow as pa

    target = schema().field("objects").type
    if not (pa.types.is_list(objects.type) and pa.types.is_struct(objects.type.value_type)):
        raise ValueError(f"objects of type {objects.type}")
    columns = {f.name: objects.values.field(f.name) for f in fields(ObjectRow)}
    columns["name"] = _encode_strings(columns["name"])
    columns[PEAK_COLUMN] = _list_maxima(columns["pixels"].cast(pa.list_(pa.int32())))
    arrays = [columns[f.name].cast(f.type) for f in target.value_type]
    structs = pa.StructArray.from_arrays(arrays, fields=list(target.value_type))
    return pa.ListArray.from_arrays(objects.offsets, structs, type=target)


def _encode_strings(texts: pa.Array) -> pa.DictionaryArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = texts.cast(pa.string())
    values = texts.unique().sort()
    return pa.DictionaryArray.from_arrays(pc.index_in(texts, values), values)


def _list_maxima(lists: pa.ListArray) -> pa.Array:
    """The maximum of each list of int32; 0 for an empty list."""
    import numpy as np
    import pyarrow as pa

    offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy()
    maxima: np.ndarray = np.zeros(len(lists), np.int32)
    nonempty = np.diff(offsets) > 0
    if nonempty.any():
        # Empty lists hold no values, so the offsets of the others delimit these.
        maxima[nonempty] = np.maximum.reduceat(values[: offsets[-1]], offsets[:-1][nonempty])
    return pa.array(maxima)
