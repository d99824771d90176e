from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from medsam2.errors import UserError
from medsam2.shards.index import IndexRow, ObjectRow, read_index, schema, write_index


def test_rows_say_what_the_json_members_say(shards: Path):
    index = read_index(shards)
    for number in range(len(index)):
        row = index.row(number)
        with open(shards / row.shard, "rb") as file:
            file.seek(row.json_offset)
            record = json.loads(file.read(row.json_length))
        assert record["key"] == row.key
        assert record["shape"] == [len(row.frames), row.height, row.width]
        assert [o["pixels"] for o in record["objects"]] == [o.pixels for o in row.objects]
        assert [sum(o["boxes"], []) for o in record["objects"]] == [o.boxes for o in row.objects]
        assert record["spacing"] == row.spacing
        assert len(row.frame_offset) == len(row.mask_length) == len(row.frames)


def test_an_index_travels_to_workers_as_its_folder(shards: Path):
    index = read_index(shards)
    content = pickle.dumps(index)
    assert len(content) < 1000
    assert pickle.loads(content).row(0) == index.row(0)


def test_rows_count_from_the_end_too_and_end_somewhere(shards: Path):
    index = read_index(shards)
    assert index.row(-1) == index.row(len(index) - 1)
    with pytest.raises(IndexError):
        index.row(len(index))


def test_a_folder_without_index_and_a_wrong_name_get_a_hint(shards: Path):
    with pytest.raises(UserError, match=f"Did you mean '{shards}'"):
        read_index(shards.parent)
    with pytest.raises(UserError, match="Did you mean 'shards'"):
        read_index(shards.parent / "shard")


def test_a_damaged_index_is_refused(tmp_path: Path, shards: Path):
    content = (shards / "index.arrow").read_bytes()
    for cut in (0, 100, len(content) // 2, len(content) - 20):
        (tmp_path / "index.arrow").write_bytes(content[:cut])
        with pytest.raises(UserError, match="not a readable index"):
            read_index(tmp_path)


def plain(kind: pa.DataType) -> pa.DataType:
    """A column's type before texts were coded and objects had a peak."""
    if pa.types.is_dictionary(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([(f.name, plain(f.type)) for f in kind if f.name != "peak"])
    return pa.list_(plain(kind.value_type)) if pa.types.is_list(kind) else kind


def write_earlier(folder: Path, rows: list[dict[str, Any]], pieces: int = 1) -> None:
    """An index as earlier versions wrote it, in several batches where asked for."""
    table = pa.Table.from_pylist(rows, schema=pa.schema([(f.name, plain(f.type)) for f in schema()]))
    with pa.OSFile(str(folder / "index.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=-(-len(rows) // pieces))


@pytest.mark.parametrize("pieces", [1, 3])
def test_an_index_of_an_earlier_version_has_the_same_rows(tmp_path: Path, shards: Path, pieces: int):
    now = read_index(shards)
    write_earlier(tmp_path, now.table.to_pylist(), pieces)
    before = read_index(tmp_path)
    assert [before.row(n) for n in range(len(before))] == [now.row(n) for n in range(len(now))]
    assert before.table.schema == schema() and before.table.to_pylist() == now.table.to_pylist()


def test_the_same_rows_give_the_same_bytes(tmp_path: Path, shards: Path):
    write_index(tmp_path, read_index(shards).table.to_pylist(), {})
    assert (tmp_path / "index.arrow").read_bytes() == (shards / "index.arrow").read_bytes()


def test_texts_are_stored_as_sorted_codes_in_one_batch(shards: Path):
    with pa.memory_map(str(shards / "index.arrow")) as source:
        file = pa.ipc.open_file(source)
        assert file.num_record_batches == 1
        batch = file.get_batch(0)
    coded = [name for name in batch.schema.names if pa.types.is_dictionary(batch.schema.field(name).type)]
    assert set(coded) == {name for name, kind in IndexRow.__annotations__.items() if kind == "str"} - {"key"}
    names = batch.column("objects").values.field("name").dictionary.to_pylist()
    assert len(names) > 1
    for values in (names, *(batch.column(name).dictionary.to_pylist() for name in coded)):
        assert values == sorted(set(values))


def test_a_peak_is_the_largest_count_of_its_own_object(tmp_path: Path, shards: Path):
    first = read_index(shards).table.to_pylist()[0]
    counts: list[list[int]] = [[], [3, 9, 1], [], [], [7], [2, 0], []]
    objects = [vars(ObjectRow(f"o{n}", n, 0, pixels, [])) for n, pixels in enumerate(counts)]
    rows = [{**first, "objects": objects[:2]}, {**first, "objects": []}, {**first, "objects": objects[2:]}]
    (tmp_path / "earlier").mkdir()
    write_index(tmp_path, rows, {})
    write_earlier(tmp_path / "earlier", rows)
    for folder in (tmp_path, tmp_path / "earlier"):
        peaks = [o["peak"] for row in read_index(folder).table.to_pylist() for o in row["objects"]]
        assert peaks == [0, 9, 0, 0, 7, 2, 0]


def test_opening_copies_nothing(shards: Path):
    before = pa.total_allocated_bytes()
    table = read_index(shards).table
    buffers = sum(column.nbytes for column in table.columns)
    assert pa.total_allocated_bytes() - before < 0.2 * buffers


def test_a_column_that_is_missing_or_of_another_kind_is_named(tmp_path: Path, shards: Path):
    table = read_index(shards).table

    def write(changed: pa.Table) -> None:
        with pa.OSFile(str(tmp_path / "index.arrow"), "wb") as file, pa.ipc.new_file(file, changed.schema) as writer:
            writer.write_table(changed)

    write(table.drop_columns(["case", "scale"]))
    with pytest.raises(UserError, match="lacks the columns case, scale"):
        read_index(tmp_path)
    place = table.schema.get_field_index("height")
    write(table.set_column(place, "height", pa.array(["tall"] * len(table))))
    with pytest.raises(UserError, match="not a readable index.*tall"):
        read_index(tmp_path)
    write(table.set_column(table.schema.get_field_index("objects"), "objects", pa.array([1] * len(table))))
    with pytest.raises(UserError, match=r"index\.arrow: not a readable index"):
        read_index(tmp_path)
