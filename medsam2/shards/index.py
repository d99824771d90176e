"""`index.arrow`: one row a segment, memory-mapped, with the place of every member; `index.json`: for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsam2.errors import UserError, did_you_mean
from medsam2.files import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa

ARROW, JSON = "index.arrow", "index.json"


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

    @property
    def mask_shape(self) -> tuple[int, int, int]:
        """[P, H, W] of one frame's label planes."""
        return (self.mask_planes, self.height, self.width)


def schema() -> pa.Schema:
    """The columns of `index.arrow`."""
    import pyarrow as pa

    text, i32, i64, f64 = pa.string(), pa.int32(), pa.int64(), pa.float64()
    found = pa.struct(
        [("name", text), ("value", i32), ("plane", i32), ("pixels", pa.list_(i32)), ("boxes", pa.list_(i32)),
         ("lines", pa.list_(pa.float32()))]
    )  # fmt: skip
    kinds = {
        "str": text,
        "list[int]": pa.list_(i32),
        "list[float]": pa.list_(f64),
        "int": i32,
        "list[ObjectRow]": pa.list_(found),
    }
    wide = {
        "frame_offset": pa.list_(i64), "frame_length": pa.list_(i64), "mask_offset": pa.list_(i64),
        "mask_length": pa.list_(i64), "json_offset": i64, "json_length": i64,
    }  # fmt: skip
    return pa.schema([(f.name, wide.get(f.name, kinds[str(f.type)])) for f in fields(IndexRow)])


class SegmentIndex:
    """The segments of a folder of shards. Pickles as its folder, so that workers map the file themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    @cached_property
    def table(self) -> pa.Table:
        """All rows, memory-mapped."""
        import pyarrow as pa

        path = self.folder / ARROW
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: not a readable index ({error}); prepare the shards again.") from None
        missing = [name for name in schema().names if name not in table.column_names]
        if missing:
            raise UserError(f"{path}: lacks the columns {', '.join(missing)}; prepare the shards again.")
        return table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def row(self, index: int) -> IndexRow:
        """Segment `index` (negative counts from the end)."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"row {index} of {count} segments")
        values = self.table.slice(index % count, 1).to_pylist()[0]
        values["objects"] = [ObjectRow(**found) for found in values["objects"]]
        return IndexRow(**{f.name: values[f.name] for f in fields(IndexRow)})


def read_index(folder: Path | str) -> SegmentIndex:
    """The index of a folder of shards.

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
    index = SegmentIndex(folder)
    index.table  # noqa: B018  # opened now, so that a damaged index is reported here
    return index


def write_index(folder: Path, rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Publish the index: `index.json` first, `index.arrow` last, each whole or absent."""
    import pyarrow as pa

    table = pa.Table.from_pylist(list(rows), schema=schema()).combine_chunks()
    with atomic_write(folder / JSON, "w") as file:
        json.dump(summary, file, indent=1, sort_keys=True)
        file.write("\n")
    with atomic_write(folder / ARROW) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
