from __future__ import annotations

import json
import logging
import multiprocessing
import pickle
import shutil
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from http_shards import Fault, HttpShards, until

from medsam2.data import cache, remote
from medsam2.data.cache_settings import CacheSettings, default_folder
from medsam2.data.cached_store import CachedStore
from medsam2.data.catalog import Catalog
from medsam2.data.settings import DataSettings
from medsam2.data.sources import find_sources
from medsam2.data.store import LocalStore, open_store
from medsam2.errors import UserError
from medsam2.shards.index import read_index, write_index

SHARDS = [f"d-train-00000{n}.tar" for n in range(3)] + ["d-val-000000.tar", "e-train-000000.tar", "e-train-000001.tar"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(cache, "GRACE", 0.005)


@pytest.fixture
def settings(tmp_path: Path) -> CacheSettings:
    return CacheSettings(folder=tmp_path / "cache")


@pytest.fixture
def memory(local: Path) -> Iterator[str]:
    """The same shards in fsspec's file system in memory."""
    name = f"/{uuid4()}"
    filesystem = fsspec.filesystem("memory")
    filesystem.put(f"{local}/", f"{name}/shards/", recursive=True)
    yield f"memory:/{name}/shards"
    filesystem.rm(name, recursive=True)


def test_paths_and_file_urls_are_local(local: Path, settings: CacheSettings):
    for where in (local, str(local), f"file://{local}"):
        store = open_store(where, settings)
        assert isinstance(store, LocalStore)
        assert not store.remote
        assert store.index_folder == local
        assert store.path(SHARDS[0]) == local / SHARDS[0]
        store.fetch_ahead(SHARDS)
    assert settings.folder is not None and not settings.folder.exists()


def test_a_local_index_cannot_lead_out_of_its_folder(local: Path):
    with pytest.raises(UserError, match="not the plain name"):
        LocalStore(local).path("../../etc/passwd")


@pytest.mark.parametrize("url", ["s4://bucket/shards", "gdrive-of-mine://x"])
def test_an_unknown_protocol_is_refused_with_what_to_install(url: str, settings: CacheSettings):
    with pytest.raises(UserError, match=f"{url}: cannot be opened .* install the fsspec package"):
        open_store(url, settings)


@pytest.mark.parametrize("kind", ["memory", "server"])
def test_a_remote_folder_gives_the_same_index_and_shards(
    kind: str, local: Path, settings: CacheSettings, request: pytest.FixtureRequest
):
    given = request.getfixturevalue(kind)
    store = open_store(given if kind == "memory" else given.url, settings)
    assert store.remote
    assert read_index(store.index_folder).table.equals(read_index(local).table)
    assert (store.index_folder / "index.json").read_bytes() == (local / "index.json").read_bytes()
    for shard in SHARDS:
        assert store.path(shard).read_bytes() == (local / shard).read_bytes()
        assert store.path(shard).parent == store.index_folder


def test_everything_is_fetched_once_for_all_stores_of_a_url(server: HttpShards, settings: CacheSettings):
    for _ in range(3):
        store = open_store(f"{server.url}/", settings)
        for shard in SHARDS * 2:
            store.path(shard)
    assert server.gets == {name: 1 for name in (*SHARDS, "index.arrow", "index.json")}


def test_a_store_can_be_pickled_and_needs_no_request_for_that(server: HttpShards, settings: CacheSettings):
    store = open_store(server.url, settings)
    store.fetch_ahead(SHARDS[:1])
    requests = server.heads.total()
    again = pickle.loads(pickle.dumps(store))
    assert (again.where, again.index_folder) == (server.url, store.index_folder)
    assert again.path(SHARDS[1]).is_file()
    again.fetch_ahead(SHARDS[2:3])
    until((store.index_folder / SHARDS[2]).is_file)
    assert server.heads.total() == requests


def test_fetching_ahead_spares_the_later_request(server: HttpShards, settings: CacheSettings):
    store = open_store(server.url, settings)
    server.pause = 0.05
    start = time.monotonic()
    store.fetch_ahead(SHARDS[:3])
    assert time.monotonic() - start < 0.04
    until(lambda: all((store.index_folder / shard).is_file() for shard in SHARDS[:3]))
    server.close()
    assert [store.path(shard).name for shard in SHARDS[:3]] == SHARDS[:3]
    assert all(server.gets[shard] == 1 for shard in SHARDS[:3])
    assert all(server.gets[shard] == 0 for shard in SHARDS[3:])


def test_fetching_ahead_stops_at_the_limit_and_evicts_nothing_that_is_wished(
    server: HttpShards, local: Path, settings: CacheSettings
):
    size = (local / SHARDS[3]).stat().st_size
    small = [shard for shard in SHARDS if (local / shard).stat().st_size == size]
    assert len(small) == 4
    store = open_store(server.url, settings.model_copy(update={"size_gb": 2.5 * size / 1e9}))
    store.path(small[3])
    time.sleep(0.01)
    store.fetch_ahead(small[:3])
    until(lambda: server.gets[small[0]] and server.gets[small[1]] and (store.index_folder / small[1]).is_file())
    until(lambda: not store._ahead._running)  # type: ignore[attr-defined]
    assert sorted(path.name for path in store.index_folder.glob("*.tar")) == small[:2]
    assert server.gets[small[2]] == 0
    store.path(small[0])  # used: may go as soon as something else is wished
    time.sleep(0.01)
    store.fetch_ahead([small[1], small[2]])
    until((store.index_folder / small[2]).is_file)
    assert server.gets[small[1]] == 1
    for shard in small[1:3]:
        store.path(shard)
    time.sleep(0.01)
    store.fetch_ahead(small[1:3] + small[:1])  # wished again: they stay, so there is no room for the third
    until(lambda: not store._ahead._running)  # type: ignore[attr-defined]
    time.sleep(0.02)
    store.fetch_ahead(small[:1])
    until(lambda: not store._ahead._running)  # type: ignore[attr-defined]
    assert sorted(path.name for path in store.index_folder.glob("*.tar")) == small[1:3]
    assert server.gets[small[0]] == 1


def test_shards_that_the_index_does_not_describe_are_checked_against_the_size_that_the_server_tells(
    server: HttpShards, local: Path, settings: CacheSettings
):
    (local / "index.json").unlink()
    store = open_store(server.url, settings)
    assert not (store.index_folder / "index.json").exists()
    server.fail(SHARDS[0], Fault(stop=1000))
    assert store.path(SHARDS[0]).read_bytes() == (local / SHARDS[0]).read_bytes()
    assert server.gets[SHARDS[0]] == 2


def test_a_changed_index_is_fetched_again_and_its_changed_shards_too(
    server: HttpShards, local: Path, settings: CacheSettings
):
    old = open_store(server.url, settings)
    for shard in SHARDS[:2]:
        old.path(shard)
    content = bytearray((local / SHARDS[0]).read_bytes())
    content[700] ^= 1
    (local / SHARDS[0]).write_bytes(content)
    summary = json.loads((local / "index.json").read_text())
    summary["shards"][SHARDS[0]]["sha256"] = sha256(content).hexdigest()
    rows = read_index(local).table.to_pylist()
    write_index(local, rows[:-1], summary)

    new = open_store(server.url, settings)
    assert len(read_index(new.index_folder)) == len(rows) - 1
    assert new.path(SHARDS[0]).read_bytes() == content
    new.path(SHARDS[1])
    assert (server.gets[SHARDS[0]], server.gets[SHARDS[1]], server.gets["index.arrow"]) == (2, 1, 2)


def test_shards_without_a_description_are_dropped_with_the_index_that_they_came_with(
    server: HttpShards, local: Path, settings: CacheSettings
):
    (local / "index.json").unlink()
    open_store(server.url, settings).path(SHARDS[0])
    open_store(server.url, settings).path(SHARDS[0])
    assert server.gets[SHARDS[0]] == 1
    rows = read_index(local).table.to_pylist()
    write_index(local, rows[:-1], {})
    open_store(server.url, settings).path(SHARDS[0])
    assert server.gets[SHARDS[0]] == 2


def test_an_index_that_vanished_from_the_json_leaves_none_behind(
    server: HttpShards, local: Path, settings: CacheSettings
):
    store = open_store(server.url, settings)
    assert (store.index_folder / "index.json").exists()
    (local / "index.json").unlink()
    assert not (open_store(server.url, settings).index_folder / "index.json").exists()


def test_a_server_that_tells_no_version_is_asked_for_the_index_each_time(local: Path, settings: CacheSettings):
    with HttpShards(local, versions=False) as server:
        for _ in range(3):
            open_store(server.url, settings).path(SHARDS[0])
        assert (server.gets["index.arrow"], server.gets[SHARDS[0]]) == (3, 1)


def test_a_changed_memory_file_is_noticed(memory: str, local: Path, settings: CacheSettings):
    rows = len(read_index(open_store(memory, settings).index_folder))
    write_index(local, read_index(local).table.to_pylist()[:-2], json.loads((local / "index.json").read_text()))
    for name in ("index.json", "index.arrow"):
        fsspec.filesystem("memory").put_file(str(local / name), f"{memory.removeprefix('memory:/')}/{name}")
    assert len(read_index(open_store(memory, settings).index_folder)) == rows - 2


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"shards": [1]}', b'{"shards": {"d-train-000000.tar": {"bytes": "many"}}}', b"\xff"]
)
def test_an_index_json_that_is_not_ours_is_not_relied_upon(
    content: bytes, server: HttpShards, local: Path, settings: CacheSettings
):
    (local / "index.json").write_bytes(content)
    store = open_store(server.url, settings)
    assert store.path(SHARDS[0]).read_bytes() == (local / SHARDS[0]).read_bytes()


def test_a_query_is_sent_with_every_file_and_shown_nowhere(
    server: HttpShards, settings: CacheSettings, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG, logger="medsam2")
    store = open_store(f"{server.url}?signature=secret", settings)
    server.fail(SHARDS[0], Fault(503), Fault(stop=10))
    store.path(SHARDS[0])
    assert set(server.queries) == {"signature=secret"}
    server.fail(SHARDS[1], *[Fault(500)] * 4)
    with pytest.raises(UserError, match=r"500.*after 4 attempts") as caught:
        store.path(SHARDS[1])
    with pytest.raises(FileNotFoundError) as missing:
        store.path("other.tar")
    assert "secret" not in caplog.text + str(caught.value) + str(missing.value)
    assert "tried again" in caplog.text


def test_a_query_is_in_no_name_of_a_data_set_and_in_no_message(server: HttpShards, settings: CacheSettings):
    url = f"{server.url}?signature=secret"
    catalog = Catalog(open_store(url, settings))
    own = DataSettings(shards=(url,))
    labels = [source.label for source in find_sources([catalog], own, "train")]
    assert labels and all(label.startswith(f"{server.url.rsplit('/', 1)[-1]}:") for label in labels)
    with pytest.raises(UserError, match="no split 'trian'") as caught:
        find_sources([catalog], own, "trian")
    assert "secret" not in str(caught.value) + "".join(labels)


def test_the_name_of_a_folder_is_that_of_its_place(local: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(local)
    assert Catalog(".").name == Catalog(local).name == local.resolve().name


def test_names_with_odd_characters_are_fetched(server: HttpShards, local: Path, settings: CacheSettings):
    name = "d train#1?é%20-000000.tar"
    shutil.copy(local / SHARDS[0], local / name)
    assert open_store(server.url, settings).path(name).read_bytes() == (local / name).read_bytes()


def test_the_default_folder_is_the_users_cache_or_what_the_environment_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("MEDSAM2_CACHE", raising=False)
    assert default_folder() == Path("/home/somebody/.cache/medsam2/shards")
    monkeypatch.setenv("MEDSAM2_CACHE", "/scratch/shards")
    assert default_folder() == Path("/scratch/shards")


def test_a_cache_folder_that_cannot_be_made_is_named(server: HttpShards, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/cache: cannot hold the cache .* data\.cache\.folder"):
        open_store(server.url, CacheSettings(folder=tmp_path / "file" / "cache"))


def _in_child(store: CachedStore, shards: list[str], barrier: Any, results: Any) -> None:
    barrier.wait(20)
    store.fetch_ahead(shards)
    results.put([store.path(shard).read_bytes() for shard in shards])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes_at_once_fetch_each_shard_once(start: str, server: HttpShards, local: Path, settings: CacheSettings):
    store = open_store(server.url, settings)
    store.fetch_ahead(SHARDS[:1])  # the parent has a thread, an event loop and perhaps a lock when it forks
    server.pause = 0.05
    context = multiprocessing.get_context(start)
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_in_child, args=(store, SHARDS[:4], barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for _ in workers:
        assert results.get(timeout=30) == [(local / shard).read_bytes() for shard in SHARDS[:4]]
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == 0
    assert {shard: server.gets[shard] for shard in SHARDS[:4]} == dict.fromkeys(SHARDS[:4], 1)


def test_a_forked_worker_reads_and_fetches_ahead_from_memory(memory: str, local: Path, settings: CacheSettings):
    store = open_store(memory, settings)
    store.path(SHARDS[0])
    store.fetch_ahead(SHARDS[1:2])
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(1), context.Queue()
    worker = context.Process(target=_in_child, args=(store, SHARDS, barrier, results))
    worker.start()
    assert results.get(timeout=30) == [(local / shard).read_bytes() for shard in SHARDS]
    worker.join(10)
    assert worker.exitcode == 0
