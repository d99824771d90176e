"""Stores give the bytes of shards, from this machine or by range from behind a URL."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from http_shards import HttpShards

from medsam2.data.plan.sources import find_sources
from medsam2.data.read import store as module
from medsam2.data.read.catalog import Catalog
from medsam2.data.read.store import ByteRange, LocalStore, RemoteStore, ShardStore, open_store, store_index
from medsam2.data.settings import DataSettings
from medsam2.errors import UserError
from medsam2.shards.index import read_index
from medsam2.shards.target import mask_secrets


@pytest.fixture(params=["http", "memory"])
def url(request: pytest.FixtureRequest, local: Path) -> Iterator[str]:
    """`local` behind a URL."""
    if request.param == "http":
        yield request.getfixturevalue("server").url
        return
    name, filesystem = f"/{uuid4()}", fsspec.filesystem("memory")
    filesystem.put(f"{local}/", f"{name}/shards/", recursive=True)
    yield f"memory:/{name}/shards"
    filesystem.rm(name, recursive=True)


def first_frames(folder: Path) -> list[ByteRange]:
    """The first frame of each segment."""
    catalog, ranges = Catalog(folder), []
    for row in range(len(catalog)):
        where = catalog.location(row)
        ranges.append(ByteRange(where.shard, int(where.frame_offset[0]), int(where.frame_length[0])))
    return ranges


def read(store: ShardStore, ranges: list[ByteRange]) -> list[bytes]:
    return [bytes(content) for content in store.read_ranges(ranges)]


def expected(folder: Path, ranges: list[ByteRange]) -> list[bytes]:
    return [(folder / shard).read_bytes()[offset : offset + length] for shard, offset, length in ranges]


def test_paths_and_file_urls_are_local(local: Path) -> None:
    for location in (local, str(local), f"file://{local}"):
        store = open_store(location)
        assert isinstance(store, LocalStore) and not store.remote and store.index_folder == local
        assert read(store, first_frames(local)) == expected(local, first_frames(local))


@pytest.mark.parametrize("url", ["s4://bucket/shards", "gdrive-of-mine://x"], indirect=False)
def test_an_unknown_protocol_is_refused_with_what_to_install(url: str) -> None:
    with pytest.raises(UserError, match=f"{url}: cannot be opened .* install the fsspec package"):
        open_store(url)


def test_a_local_range_ends_with_its_file_and_a_missing_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(range(100)))
    store = LocalStore(tmp_path)
    ranges = [ByteRange("a.tar", 10, 30), ByteRange("a.tar", 90, 30), ByteRange("a.tar", 200, 30)]
    assert read(store, ranges) == [bytes(range(10, 40)), bytes(range(90, 100)), b""]
    assert read(store, []) == []
    with pytest.raises(FileNotFoundError):
        read(store, [ByteRange("b.tar", 0, 1)])


def test_few_files_are_open_at_a_time_and_none_once_the_store_is_gone(tmp_path: Path) -> None:
    names = [f"{number}.tar" for number in range(module.MAX_OPEN_SHARDS + 5)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    store, before = LocalStore(tmp_path), len(os.listdir("/proc/self/fd"))
    ranges = [byte_range for name in names for byte_range in (ByteRange(name, 0, 9), ByteRange(names[0], 0, 9))]
    assert read(store, ranges) == [byte_range.shard.encode() for byte_range in ranges]
    assert len(os.listdir("/proc/self/fd")) == before + module.MAX_OPEN_SHARDS
    del store
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_remote_folder_gives_the_same_index_and_bytes(url: str, local: Path) -> None:
    store = open_store(url)
    assert isinstance(store, RemoteStore) and store.remote
    assert read_index(store.index_folder).table.equals(read_index(local).table)
    assert (store.index_folder / "index.json").read_bytes() == (local / "index.json").read_bytes()
    ranges = first_frames(local)
    ranges.append(ranges[-1]._replace(length=1 << 20))
    assert read(store, ranges) == expected(local, ranges), "what ends before ends with the shard"
    shard, offset, length = ranges[0]
    assert store_index(pickle.loads(pickle.dumps(store))).read(shard, offset, length) == expected(local, ranges)[0]


def test_each_range_is_one_request_and_those_of_a_group_are_made_together(
    server: HttpShards, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ranges = open_store(server.url), first_frames(local)
    before = server.sent
    assert read(store, ranges) == expected(local, ranges)
    gets = {path.name: server.gets[path.name] for path in local.glob("*.tar")}
    assert sum(gets.values()) == len(ranges) and all(server.ranged[name] == count for name, count in gets.items())
    assert server.sent - before == sum(byte_range.length for byte_range in ranges)
    monkeypatch.setattr(module, "MAX_REQUESTS_AT_ONCE", 2)
    requests, contents = server.gets.total(), store.read_ranges(ranges)
    assert server.gets.total() == requests, "nothing is requested before it is asked for"
    next(contents)
    assert server.gets.total() == requests + 2


def test_the_fetched_index_goes_with_the_store(server: HttpShards) -> None:
    store = open_store(server.url)
    folder, copy = store.index_folder, pickle.loads(pickle.dumps(store))
    assert copy.index_folder == folder
    del copy
    gc.collect()
    assert {path.name for path in folder.iterdir()} == {"index.arrow", "index.json"}
    del store
    gc.collect()
    assert not folder.exists()


def test_a_folder_without_a_json_is_read_too(server: HttpShards, local: Path) -> None:
    (local / "index.json").unlink()
    store = open_store(server.url)
    assert read(store, first_frames(local)) == expected(local, first_frames(local))
    assert not (store.index_folder / "index.json").exists()


def test_an_index_cannot_lead_out_of_its_folder(server: HttpShards, local: Path) -> None:
    for store in (open_store(local), open_store(server.url)):
        for shard in ("../x.tar", ".x.tar", "x.zip", "a\\b.tar"):
            with pytest.raises(UserError, match="not the plain name"):
                read(store, [ByteRange(shard, 0, 1)])


def test_names_with_odd_characters_are_read(server: HttpShards, local: Path) -> None:
    name = "d train#1?é%20-000000.tar"
    shutil.copy(local / "d-train-000000.tar", local / name)
    assert read(open_store(server.url), [ByteRange(name, 0, 2000)]) == [(local / name).read_bytes()[:2000]]


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://me:pw@host:80/a/b?X-Amz-Signature=s", "https://host:80/a/b"),
        ("simplecache::https://me:p@w@host/a?s=1#x", "simplecache::https://host/a"),
        ("503, url='http://u:p@h/a.tar?s=%2F1', then (see http://h/b?t)", "503, url='http://h/a.tar', then (see http://h/b)"),
        ("s3://bucket/shards", "s3://bucket/shards"),
        ("why? me@host", "why? me@host"),
    ],
)  # fmt: skip
def test_secrets_of_urls_are_masked(text: str, masked: str) -> None:
    assert mask_secrets(text) == masked


def test_secrets_are_in_no_name_of_a_data_set_and_in_no_message(server: HttpShards) -> None:
    url = f"{server.url}?signature=secret"
    catalog, settings = Catalog(open_store(url)), DataSettings(shards=(url,))
    labels = [source.label for source in find_sources([catalog], settings, "train")]
    assert labels and all(label.startswith(f"{server.url.rsplit('/', 1)[-1]}:") for label in labels)
    with pytest.raises(UserError, match="no split 'trian'") as caught:
        find_sources([catalog], settings, "trian")
    assert "secret" not in str(caught.value) + "".join(labels)


def test_the_name_of_a_folder_is_that_of_its_place(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(local)
    assert Catalog(".").name == Catalog(local).name == local.resolve().name


def _in_child(stores: list[ShardStore], ranges: list[ByteRange], results: Any) -> None:
    results.put([read(store, ranges) for store in stores])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_another_process_reads_too(start: str, server: HttpShards, local: Path) -> None:
    stores, ranges = [open_store(server.url), open_store(local)], first_frames(local)
    for store in stores:  # the parent has an event loop, connections and open files when it forks
        read(store, ranges)
    context = multiprocessing.get_context(start)
    results = context.Queue()
    worker = context.Process(target=_in_child, args=(stores, ranges, results))
    worker.start()
    assert results.get(timeout=60) == [expected(local, ranges)] * 2
    worker.join(10)
    assert worker.exitcode == 0
    assert [read(store, ranges) for store in stores] == [expected(local, ranges)] * 2
