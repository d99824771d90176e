from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsam2.data.read.catalog import MAX_CACHED_TEXTS, Catalog, Texts
from medsam2.data.read.store import LocalStore
from medsam2.errors import UserError
from medsam2.shards.index import write_index

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "index.py"
TEXTS = ("dataset", "split", "case", "patient", "content_hash", "modality", "kind", "mask_dtype", "codec",
         "mask_codec", "window", "shard")  # fmt: skip
LISTS = ("frame_offset", "frame_length", "mask_offset", "mask_length")
MILLION = 1_000_000


def make_row(number: int, frames: int, objects: list[tuple[str, list[int]]]) -> dict[str, Any]:
    """A row whose every value differs from its neighbours', where it may."""
    return {
        "key": f"clé-{number:05d}",
        **{name: f"{name}{number % (place + 2)}" for place, name in enumerate(TEXTS)},
        "frames": list(range(frames)),
        "shard": f"d-train-{number % 2:06d}.tar",
        "height": 8 + number,
        "width": 9 + number,
        "channels": 1 + 2 * (number % 2),
        "mask_planes": 1 + number % 3,
        "spacing": [1.0, 1.0, 1.0],
        "scale": [1.0, 1.0],
        "original_shape": [frames, 8, 9],
        "objects": [
            {"name": name, "value": place + 1, "plane": place % 2, "pixels": pixels, "boxes": [0] * 4 * frames}
            for place, (name, pixels) in enumerate(objects)
        ],
        **{name: [(number + 1) * 10**10 * (place % 2 == 0) + t for t in range(frames)]
           for place, name in enumerate(LISTS)},
        "json_offset": 512 * number,
        "json_length": 2,
    }  # fmt: skip


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows of 0 to 4 objects and 1 to 5 frames."""
    rows = []
    for number in range(draw(st.integers(1, 8))):
        frames = draw(st.integers(1, 5))
        counts = st.lists(st.integers(0, 2**20), min_size=frames, max_size=frames)
        objects = draw(st.lists(st.tuples(st.sampled_from(["liver", "lésion", "", "a b"]), counts), max_size=4))
        rows.append(make_row(number, frames, objects))
    return rows


ROWS = [make_row(n, 1 + n % 3, [(f"o{k % 3}", [n + k] * (1 + n % 3)) for k in range(n % 4)]) for n in range(9)]


def agrees(catalog: Catalog, rows: list[dict[str, Any]]) -> None:
    """Every answer of the catalog is what the rows say."""
    assert len(catalog) == len(rows)
    everywhere = np.arange(len(rows))
    for name in ("key", *TEXTS):
        texts = [row[name] for row in rows]
        assert [catalog.text(name, row) for row in range(len(rows))] == texts
        if name != "key":
            assert catalog.distinct(name, everywhere[1::2]) == sorted(set(texts[1::2]))
            values, codes = catalog.codes(name)
            assert [values[code] for code in codes] == texts
    every = [record for row in rows for record in row["objects"]]
    assert [catalog.names[code] for code in catalog.name_codes] == [record["name"] for record in every]
    assert catalog.peaks.tolist() == [max(record["pixels"]) for record in every]
    assert np.diff(catalog.object_offsets).tolist() == [len(row["objects"]) for row in rows]
    assert catalog.frame_counts.tolist() == [len(row["frames"]) for row in rows]
    for number, row in enumerate(rows):
        table = catalog.objects(number)
        assert [catalog.names[code] for code in table.names] == [o["name"] for o in row["objects"]]
        assert table.pixels.shape == (len(row["objects"]), catalog.num_frames(number))
        for name, values in (("pixels", table.pixels), ("value", table.values), ("plane", table.planes)):
            assert values.tolist() == [o[name] for o in row["objects"]]
        where = catalog.location(number)
        for name in ("key", "shard", "height", "width", "channels", "mask_planes", "mask_dtype", "codec", "mask_codec"):
            assert getattr(where, name) == row[name]
        for name in LISTS:
            assert getattr(where, name).tolist() == row[name]


@given(rows=tables())
@settings(max_examples=40, deadline=None)
def test_a_catalog_says_what_the_rows_say(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("index")
    write_index(folder, rows, {})
    agrees(Catalog(folder), rows)


def earlier_schema() -> pa.Schema:
    """The columns before texts were coded and peaks stored."""
    text, ints, wide = pa.string(), pa.list_(pa.int32()), pa.list_(pa.int64())
    object_type = pa.struct([("name", text), ("value", pa.int32()), ("plane", pa.int32()), ("pixels", ints),
                       ("boxes", ints), ("lines", pa.list_(pa.float32()))])  # fmt: skip
    kinds = {"frames": ints, "original_shape": ints, "spacing": pa.list_(pa.float64()), "scale": pa.list_(pa.float64()),
             "objects": pa.list_(object_type), "json_offset": pa.int64(), "json_length": pa.int64()}  # fmt: skip
    kinds |= dict.fromkeys(LISTS, wide) | dict.fromkeys(("key", *TEXTS), text)
    return pa.schema([(name, kinds.get(name, pa.int32())) for name in ROWS[0]])


@pytest.mark.parametrize("pieces", [1, 3])
def test_an_index_of_an_earlier_version_is_read_as_well(tmp_path: Path, pieces: int):
    table = pa.Table.from_pylist(ROWS, schema=earlier_schema())
    with pa.OSFile(str(tmp_path / "index.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=-(-len(ROWS) // pieces))
    catalog = Catalog(tmp_path)
    agrees(catalog, ROWS)
    (tmp_path / "new").mkdir()
    write_index(tmp_path / "new", ROWS, {})
    new, rows = Catalog(tmp_path / "new"), np.arange(len(ROWS))
    assert catalog.digest(rows) == new.digest(rows) and catalog.names == new.names


def test_an_index_without_segments_or_objects_is_read(tmp_path: Path):
    write_index(tmp_path, [], {})
    catalog = Catalog(tmp_path)
    assert len(catalog) == len(catalog.name_codes) == len(catalog.peaks) == len(catalog.frame_counts) == 0
    assert catalog.names == tuple(catalog.codes("split")[0]) == ()
    write_index(tmp_path, [make_row(0, 2, [])], {})
    agrees(Catalog(tmp_path), [make_row(0, 2, [])])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("catalog")
    write_index(folder, ROWS, {})
    return folder


def test_a_catalog_travels_as_its_store(folder: Path):
    catalog = Catalog(LocalStore(folder))
    agrees(catalog, ROWS)
    content = pickle.dumps(catalog)
    assert len(content) < 500
    again = pickle.loads(content)
    agrees(again, ROWS)
    assert again.folder == folder and isinstance(again.store, LocalStore)


def test_a_digest_is_of_the_keys_in_their_order(folder: Path):
    catalog, rows = Catalog(folder), np.array([3, 1, 7])
    same = Catalog(folder).digest(rows.astype(np.int32))
    assert catalog.digest(rows) == same
    others = [rows[::-1], rows[:2], np.array([3, 1, 8]), rows[:0]]
    assert len({same, *(catalog.digest(other) for other in others)}) == 5
    # where one key ends and the next begins counts too
    assert Texts(pa.array(["ab", "c"])).digest(np.arange(2)) != Texts(pa.array(["a", "bc"])).digest(np.arange(2))


def test_a_digest_in_chunks_is_that_of_all_texts():
    count = (1 << 16) + 5
    texts = Texts(pa.array([f"k{n}" for n in range(count)]))
    digest = hashlib.sha256()
    for part in (range(1 << 16), range(1 << 16, count)):
        digest.update(np.array([len(f"k{n}") for n in part], "<i4").tobytes() + "".join(f"k{n}" for n in part).encode())
    assert texts.digest(np.arange(count)) == digest.hexdigest()


@given(st.lists(st.text(max_size=5), max_size=12), st.integers(0, 3), st.integers(-14, 14))
def test_texts_are_a_list_of_strings(values: list[str], skip: int, place: int):
    texts, expected = Texts(pa.array(values, pa.string()).slice(skip)), values[skip:]
    assert list(texts) == expected and len(texts) == len(expected)
    if -len(expected) <= place < len(expected):
        assert texts[place] == expected[place] and texts.index(expected[place]) == expected.index(expected[place])
    else:
        with pytest.raises(IndexError):
            texts[place]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModuleType, Path]]:
    """The benchmark of the index, and its index of 20,000 segments."""
    spec = importlib.util.spec_from_file_location("index_benchmark", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module, module.write(tmp_path_factory.mktemp("generated") / "big", 20_000)


def mapped(array: np.ndarray) -> bool:
    """Whether an array lies in the pages of an `index.arrow`."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
        if first <= address and address + array.nbytes <= last:
            return line.endswith("index.arrow")
    return False


def test_columns_are_the_mapped_file_itself(generated: tuple[ModuleType, Path]):
    catalog = Catalog(generated[1])
    table, where = catalog.objects(7), catalog.location(7)
    arrays = [catalog.name_codes, catalog.object_offsets, catalog.peaks, table.pixels, table.values, table.planes]
    arrays += [getattr(where, name) for name in LISTS] + [catalog.codes(name)[1] for name in TEXTS]
    assert all(mapped(array) for array in arrays)
    assert not mapped(catalog.frame_counts)  # the check can tell
    assert np.shares_memory(table.pixels, Catalog.objects(catalog, 7).pixels)


def test_many_distinct_texts_stay_in_the_file(generated: tuple[ModuleType, Path]):
    catalog = Catalog(generated[1])
    cases, codes = catalog.codes("case")
    assert (
        len(cases) > MAX_CACHED_TEXTS and isinstance(cases, Texts) and not isinstance(catalog.codes("codec")[0], Texts)
    )
    assert catalog.text("key", 4321).startswith(cases[codes[4321]])
    assert catalog.distinct("case", np.arange(40)) == sorted(cases[place] for place in range(10))


def test_a_rank_and_its_worker_add_little_memory_to_a_mapped_index(generated: tuple[ModuleType, Path], tmp_path: Path):
    module, big = generated
    small = module.write(tmp_path / "small", 100)
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--measure", str(big), str(small), "0"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    measured = json.loads(done.stdout.splitlines()[-1])
    assert (big / "index.arrow").stat().st_size > 45e6
    # 200 MiB for a million are 4 MiB for these; as Python records they are some 250 MiB
    assert 0 < measured["rank_mib"] < 200 * 20_000 / MILLION + 4 and measured["rank_peak_mib"] < 16
    assert measured["worker_mib"] < 8


def test_a_worker_that_reads_an_index_does_not_import_pandas(folder: Path):
    code = (
        "import sys, numpy, medsam2.data.read.catalog as c\n"
        f"catalog = c.Catalog({str(folder)!r})\n"
        "catalog.location(1), catalog.objects(1), catalog.digest(numpy.arange(3))\n"
        "catalog.distinct('case', numpy.arange(3))\n"
        "sys.exit('pandas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def place_in_file(array: np.ndarray, path: Path) -> int:
    """The byte of the mapped file at which a view of it starts."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, *_ = line.split()
        first, last = (int(part, 16) for part in span.split("-"))
        if first <= address < last and line.endswith(str(path)):
            return address - first + int(offset, 16)
    raise AssertionError(f"not a view of {path}")


def view(table: pa.Table, column: str) -> np.ndarray:
    """The offsets of a column's texts or lists, or the codes of a coded one."""
    array = table.column(column).chunk(0)
    if pa.types.is_dictionary(array.type):
        return array.indices.to_numpy()
    return np.frombuffer(array.buffers()[1], np.int32)[: len(array) + 1]


@pytest.mark.parametrize(
    ("column", "place", "value"),
    [
        ("key", -1, 2**30),  # the last offset
        ("key", 3, 2**30),
        ("key", 3, -(2**30)),
        ("objects", -1, 2**30),
        ("objects", 4, 2**30),
        ("objects", 4, -1),
        ("frame_offset", -1, 2**30),
        ("mask_length", 1, 2**30),
        ("split", 2, 2**30),  # a code
        ("split", 2, -1),
    ],
)
def test_a_damaged_index_is_an_error_and_no_crash(folder: Path, tmp_path: Path, column: str, place: int, value: int):
    path = tmp_path / "index.arrow"
    content = bytearray((folder / "index.arrow").read_bytes())
    with pa.memory_map(str(folder / "index.arrow")) as source:
        values = view(pa.ipc.open_file(source).read_all(), column)
        start = place_in_file(values, folder / "index.arrow") + 4 * (place % len(values))
    content[start : start + 4] = np.int32(value).tobytes()
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"index\.arrow: .*(not a readable index|damaged).*prepare the shards again"):
        Catalog(tmp_path).distinct(column, np.arange(len(ROWS)))


@pytest.mark.parametrize("column", ["key", "height", "split"])
def test_a_column_of_nothing_is_refused(tmp_path: Path, folder: Path, column: str):
    with pa.memory_map(str(folder / "index.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
    field = table.schema.field(column)
    table = table.set_column(table.schema.get_field_index(column), field, pa.nulls(len(table), field.type))
    with pa.OSFile(str(tmp_path / "index.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="damaged"):
        Catalog(tmp_path).distinct(column, np.arange(len(ROWS)))


def test_lists_of_another_length_are_named_by_their_row(folder: Path, tmp_path: Path):
    rows = [dict(row) for row in ROWS]
    rows[3] = make_row(3, 1, [("organ", [1, 2, 3])])
    write_index(tmp_path, rows, {})
    catalog = Catalog(tmp_path)
    catalog.objects(2)
    with pytest.raises(UserError, match="row 3 does not have a pixel count"):
        catalog.objects(3)
