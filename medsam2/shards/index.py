"""`index.arrow`: one row a segment, memory-mapped, with the place of every member; `index.json`: for people."""

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

ARROW, JSON = "index.arrow", "index.json"
PEAK = "peak"  # a column of the objects that earlier indexes lack


@dataclass(frozen=True)
class ObjectRow:
    """One object of a segment: `pixels` has T counts, `boxes` T*4 sides (x0, y0, x1, y1; zeros where absent).

    `lines` has five numbers a RECIST measurement: frame within the segment, x0, y0, x1, y1.
    """

    name: str
    value: int
    plane: int
    pixels: list[int]
    boxes: list[int]
    lines: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class IndexRow:
    """One segment. Offsets and lengths are bytes in `shard`; the rest as in `SegmentRecord`."""

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

    Strings that repeat are codes (int32) of a dictionary, and every object has its `peak`, the largest of its pixel
    counts: a plan over a million segments then looks at the mapped file itself and builds nothing of its own.
    """
    import pyarrow as pa

    i32, i64 = pa.int32(), pa.int64()
    coded = pa.dictionary(i32, pa.string())
    found = pa.struct(
        [("name", coded), ("value", i32), ("plane", i32), (PEAK, i32), ("pixels", pa.list_(i32)),
         ("boxes", pa.list_(i32)), ("lines", pa.list_(pa.float32()))]
    )  # fmt: skip
    kinds = {
        "str": coded,
        "list[int]": pa.list_(i32),
        "list[float]": pa.list_(pa.float64()),
        "int": i32,
        "list[ObjectRow]": pa.list_(found),
    }
    others = {
        "key": pa.string(), "frame_offset": pa.list_(i64), "mask_offset": pa.list_(i64), "json_offset": i64,
    }  # fmt: skip
    return pa.schema([(f.name, others.get(f.name, kinds[str(f.type)])) for f in fields(IndexRow)])


class SegmentIndex:
    """The segments of a folder of shards. Pickles without the table, so that workers map the file themselves.

    Args:
        folder: holds `index.arrow`.
        read: (name of a shard, offset, length) -> so many bytes of it, where shards do not lie beside the index.
    """

    def __init__(self, folder: Path, read: Callable[[str, int, int], bytes] | None = None) -> None:
        self.folder = Path(folder)
        self._read = read

    def read(self, shard: str, offset: int, length: int) -> bytes:
        """Bytes of a shard; fewer than asked for where it ends.

        Raises:
            OSError: it does not exist, or cannot be read.
            UserError: it lies elsewhere and cannot be reached, or its name leads out of the folder.
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
            UserError: the file is damaged, as far as can be told without reading all of it.
        """
        import pyarrow as pa

        path = self.folder / ARROW
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
            table.validate()
            missing = [name for name in schema().names if name not in table.column_names]
            if missing:
                raise UserError(f"{path}: lacks the columns {', '.join(missing)}; prepare the shards again.")
            return table if _is_stored(table) else _stored(table)
        except (pa.ArrowException, ValueError, KeyError, IndexError, OSError) as error:
            raise UserError(f"{path}: not a readable index ({error}); prepare the shards again.") from None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_read": self._read}

    def row(self, index: int) -> IndexRow:
        """Segment `index` (negative counts from the end)."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"row {index} of {count} segments")
        values = self.table.slice(index % count, 1).to_pylist()[0]
        names = [f.name for f in fields(ObjectRow)]
        values["objects"] = [ObjectRow(**{name: found[name] for name in names}) for found in values["objects"]]
        return IndexRow(**{f.name: values[f.name] for f in fields(IndexRow)})


def read_index(folder: Path | str, read: Callable[[str, int, int], bytes] | None = None) -> SegmentIndex:
    """The index of a folder of shards; `read` as in `SegmentIndex`.

    Raises:
        UserError: no such folder, no index in it, or one that is not readable.
    """
    folder = Path(folder)
    if not (folder / ARROW).is_file():
        if not folder.is_dir():
            parent = folder.absolute().parent
            names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
            raise UserError(f"{folder}: no such folder of shards.{did_you_mean(folder.name, names)}")
        inside = sorted(p.parent for p in folder.glob(f"*/{ARROW}"))
        hint = f" Did you mean {str(inside[0])!r}?" if inside else ""
        raise UserError(f"{folder}: holds no {ARROW}; make shards with `medsam2 prepare`.{hint}")
    index = SegmentIndex(folder, read)
    index.table  # noqa: B018  # opened now, so that a damaged index is reported here
    return index


def require_plain_name(shard: str) -> str:
    """`shard` itself, if it is the plain name of a tar: names come from an index that somebody else may have made.

    Raises:
        UserError: it leads to another folder, is hidden, or is no tar.
    """
    if not shard.endswith(".tar") or shard.startswith(".") or not shard.isprintable() or set(shard) & set("/\\"):
        raise UserError(
            f"the index names {shard!r} as a shard, which is not the plain name of a .tar file; do not use it."
        )
    return shard


def read_summary(folder: Path) -> dict[str, Any]:
    """The content of `index.json`; empty where it cannot be read: it is for people, shards can be read without it."""
    try:
        summary = json.loads((folder / JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def check_shards(folder: Path, shards: Iterable[str], stated: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with local shards, without reading them: they are missing, or not as long as `index.json` states.

    Args:
        stated: its "shards".
    """
    for shard in sorted(shards):
        file = folder / shard
        if Path(shard).name != shard:
            yield f"{shard}: the index names a file outside of its folder; take shards from who made them."
        elif not file.is_file():
            yield f"{file}: missing; copy it again, or prepare again."
        elif shard in stated and file.stat().st_size != stated[shard]["bytes"]:
            size, expected = file.stat().st_size, stated[shard]["bytes"]
            yield f"{file}: {size} bytes, expected {expected}; copy it again, or prepare again."


def write_index(folder: Path, rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Publish the index: `index.json` first, `index.arrow` last, each whole or absent."""
    import pyarrow as pa

    table = _stored(pa.Table.from_pylist(list(rows), schema=schema()))
    with atomic_write(folder / JSON, "w") as file:
        json.dump(summary, file, indent=1, sort_keys=True)
        file.write("\n")
    write_table(folder, table)


def write_table(folder: Path, table: pa.Table) -> None:
    """Publish `index.arrow` from the columns of `schema`, as one batch: readers then have nothing to join and copy."""
    import pyarrow as pa

    with atomic_write(folder / ARROW) as file, pa.ipc.new_file(file, schema()) as writer:
        writer.write_table(table.combine_chunks())


def _is_stored(table: pa.Table) -> bool:
    return bool(table.schema.equals(schema())) and all(column.num_chunks == 1 for column in table.columns)


def _stored(table: pa.Table) -> pa.Table:
    """A table in the columns of `schema`, each in one piece; dictionaries are sorted, so that codes sort as texts do.

    Earlier indexes and those of other tools have plain strings, and no peaks.
    """
    import pyarrow as pa

    arrays = []
    for wanted in schema():
        column = table.column(wanted.name).combine_chunks()
        array = column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks)
        if wanted.name == "objects":
            array = _stored_objects(array)
        elif pa.types.is_dictionary(wanted.type):
            array = _coded(array)
        arrays.append(array.cast(wanted.type))
    return pa.Table.from_arrays(arrays, schema=schema())


def _stored_objects(objects: pa.ListArray) -> pa.ListArray:
    """The objects with coded names and with peaks."""
    import pyarrow as pa

    wanted = schema().field("objects").type
    if not (pa.types.is_list(objects.type) and pa.types.is_struct(objects.type.value_type)):
        raise ValueError(f"objects of type {objects.type}")
    found = objects.values
    columns = {name: found.field(name) for name in (f.name for f in fields(ObjectRow))}
    columns["name"] = _coded(columns["name"])
    columns[PEAK] = _peaks(columns["pixels"].cast(pa.list_(pa.int32())))
    arrays = [columns[f.name].cast(f.type) for f in wanted.value_type]
    structs = pa.StructArray.from_arrays(arrays, fields=list(wanted.value_type))
    return pa.ListArray.from_arrays(objects.offsets, structs, type=wanted)


def _coded(texts: pa.Array) -> pa.DictionaryArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = texts.cast(pa.string())
    values = texts.unique().sort()
    return pa.DictionaryArray.from_arrays(pc.index_in(texts, values), values)


def _peaks(pixels: pa.ListArray) -> pa.Array:
    """The largest count of each list, 0 of an empty one."""
    import numpy as np
    import pyarrow as pa

    offsets, counts = pixels.offsets.to_numpy(), pixels.values.to_numpy()
    peaks: np.ndarray = np.zeros(len(pixels), np.int32)
    some = np.diff(offsets) > 0
    if some.any():
        # an empty list between two others has no values, so the starts of the others alone cut them rightly
        peaks[some] = np.maximum.reduceat(counts[: offsets[-1]], offsets[:-1][some])
    return pa.array(peaks)
