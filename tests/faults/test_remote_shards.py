"""Faults of the other side and of this one while shards are fetched: nothing that is not whole is ever read."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_shards import Fault, HttpShards, until
from small_disk import mount, small_disk
from small_shards import build

from medsam2.data import cache, remote
from medsam2.data.cache_settings import CacheSettings
from medsam2.data.store import ShardStore, open_store
from medsam2.errors import UserError

SHARD, OTHER = "d-train-000000.tar", "d-train-000001.tar"

CLIENT = """
import logging, sys
from pathlib import Path
from medsam2.data.cache_settings import CacheSettings
from medsam2.data.store import open_store
logging.basicConfig()
store = open_store(sys.argv[1], CacheSettings(folder=Path(sys.argv[2])))
{then}
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(cache, "GRACE", 0.005)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HttpShards]:
    with HttpShards(build(tmp_path / "local")) as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path) -> CacheSettings:
    return CacheSettings(folder=tmp_path / "cache")


@pytest.fixture
def store(server: HttpShards, settings: CacheSettings) -> ShardStore:
    return open_store(server.url, settings)


def whole(store: ShardStore) -> list[str]:
    """The shards and parts of shards in the cache."""
    return sorted(path.name for path in store.index_folder.iterdir() if path.suffix in (".tar", ".part"))


def client(server: HttpShards, settings: CacheSettings, then: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CLIENT.format(then=then), server.url, str(settings.folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "fault",
    [Fault(stop=0), Fault(stop=5000), Fault(503), Fault(500), Fault(429), Fault(408)],
    ids=lambda fault: f"{fault.status}-{fault.stop}",
)
def test_what_fails_for_a_while_is_tried_again_until_it_is_right(fault: Fault, server: HttpShards, store: ShardStore):
    server.fail(SHARD, fault, fault, fault)
    assert store.path(SHARD).read_bytes() == (server.folder / SHARD).read_bytes()
    assert server.gets[SHARD] == 4
    assert whole(store) == [SHARD]


def test_what_keeps_failing_is_an_error_with_address_reason_and_attempts(server: HttpShards, store: ShardStore):
    server.fail(SHARD, *[Fault(stop=5000)] * 4)
    with pytest.raises(UserError, match=rf"{server.url}/{SHARD}: .*(after 4 attempts)"):
        store.path(SHARD)
    assert whole(store) == []
    assert store.path(SHARD).is_file()  # and the next time it works


def test_pauses_grow_and_differ(server: HttpShards, store: ShardStore, monkeypatch: pytest.MonkeyPatch):
    slept: list[float] = []
    monkeypatch.setattr(remote, "PAUSE", 1.0)
    monkeypatch.setattr(remote.time, "sleep", slept.append)
    server.fail(SHARD, *[Fault(503)] * 3, *[Fault()] * 9)
    store.path(SHARD)
    for pause, base in zip(slept, (1.0, 2.0, 4.0), strict=True):
        assert base * 0.5 <= pause <= base * 1.5
    assert slept != [1.0, 2.0, 4.0]


def test_a_server_that_falls_silent_is_left_after_a_while(
    server: HttpShards, settings: CacheSettings, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(remote, "SILENCE", 0.2)
    store = open_store(server.url, settings)
    server.fail(SHARD, Fault(stop=5000, wait=30))
    start = time.monotonic()
    assert store.path(SHARD).read_bytes() == (server.folder / SHARD).read_bytes()
    assert 0.2 <= time.monotonic() - start < 5
    assert server.gets[SHARD] == 2


@pytest.mark.parametrize(
    ("status", "kind"), [(404, FileNotFoundError), (410, UserError), (401, UserError), (403, UserError)]
)
def test_what_another_attempt_cannot_mend_is_an_error_at_once(
    status: int, kind: type[Exception], server: HttpShards, store: ShardStore
):
    server.fail(SHARD, Fault(status))
    with pytest.raises(kind, match=f"{server.url}/{SHARD}"):
        store.path(SHARD)
    assert server.gets[SHARD] == 1
    assert whole(store) == []


@pytest.mark.parametrize(("status", "missing"), [(404, True), (410, True), (403, False), (500, False), (503, False)])
def test_only_a_server_that_says_so_has_no_file(status: int, missing: bool):
    """fsspec says "not found" of whatever a web server answers to a question about a file."""

    class Answer(Exception):
        def __init__(self) -> None:
            self.status = status

    error = FileNotFoundError("http://host/a.tar")
    assert remote.is_missing(error)
    error.__cause__ = Answer()
    assert remote.is_missing(error) == missing
    error.__cause__ = ConnectionRefusedError()
    assert not remote.is_missing(error)
    assert not remote.is_missing(OSError())


@pytest.mark.parametrize("damage", ["flipped", "longer"])
def test_a_shard_that_is_not_what_the_index_describes_is_refused(damage: str, server: HttpShards, store: ShardStore):
    content = bytearray((server.folder / SHARD).read_bytes())
    if damage == "flipped":
        content[5000] ^= 4
    else:
        content += b"x"
    (server.folder / SHARD).write_bytes(content)
    with pytest.raises(OSError, match=rf"{SHARD}: .*(sha256 .* of index.json|bytes came instead of)"):
        store.path(SHARD)
    assert whole(store) == []
    assert store.path(OTHER).is_file()


def test_a_flipped_bit_on_the_way_is_fetched_again(server: HttpShards, store: ShardStore):
    good = (server.folder / SHARD).read_bytes()
    (server.folder / SHARD).write_bytes(bytes([good[0] ^ 1]) + good[1:])
    server.fail(SHARD, Fault(), Fault(503))
    original = server.note

    def note(counter, name, query):  # type: ignore[no-untyped-def]
        if counter is server.gets and name == SHARD and server.gets[SHARD] == 1:
            (server.folder / SHARD).write_bytes(good)
        return original(counter, name, query)

    server.note = note  # type: ignore[method-assign]
    assert store.path(SHARD).read_bytes() == good
    assert server.gets[SHARD] == 3


def test_without_the_network_the_cached_index_and_shards_serve_with_a_warning(
    server: HttpShards, settings: CacheSettings, caplog: pytest.LogCaptureFixture
):
    open_store(server.url, settings).path(SHARD)
    server.close()
    caplog.clear()
    store = open_store(server.url, settings)
    assert [record.levelname for record in caplog.records if "is used" in record.getMessage()] == ["WARNING"]
    assert server.url in caplog.text
    assert store.path(SHARD).read_bytes() == (server.folder / SHARD).read_bytes()
    with pytest.raises(UserError, match=rf"{server.url}/{OTHER}: .*Connect.*(after 4 attempts)"):
        store.path(OTHER)


def test_without_the_network_and_a_cached_index_the_remedy_is_said(server: HttpShards, settings: CacheSettings):
    server.close()
    with pytest.raises(UserError, match=rf"{server.url}: the index cannot be fetched \(.*check the address"):
        open_store(server.url, settings)


def test_a_folder_without_an_index_is_said_to_have_none_even_if_one_is_cached(
    server: HttpShards, settings: CacheSettings
):
    open_store(server.url, settings)
    (server.folder / "index.arrow").unlink()
    with pytest.raises(UserError, match=r"holds no index\.arrow; make shards with"):
        open_store(server.url, settings)


def test_an_index_that_is_cut_on_the_way_leaves_the_old_one(server: HttpShards, settings: CacheSettings):
    store = open_store(server.url, settings)
    before = (store.index_folder / "index.arrow").read_bytes()
    os.utime(server.folder / "index.arrow")
    server.fail("index.arrow", *[Fault(stop=100)] * 4)
    assert (open_store(server.url, settings).index_folder / "index.arrow").read_bytes() == before
    gets = server.gets["index.arrow"]
    open_store(server.url, settings)  # looks again, since that was not the new one
    assert server.gets["index.arrow"] == gets + 1
    assert not list(store.index_folder.glob(".*"))


@pytest.mark.parametrize("moment", ["shard", "index"])
def test_a_killed_fetch_leaves_nothing_that_is_taken_as_whole(moment: str, server: HttpShards, settings: CacheSettings):
    name, begun = (SHARD, "*/*.part") if moment == "shard" else ("index.arrow", "*/.index.arrow.*")
    server.fail(name, Fault(stop=(server.folder / name).stat().st_size // 2, wait=60))
    folder = settings.folder
    assert folder is not None
    with client(server, settings, f"store.path({SHARD!r})") as killed:
        until(lambda: any(path.stat().st_size for path in folder.glob(begun)))
        killed.send_signal(signal.SIGKILL)
    assert list(folder.glob(begun))
    store = open_store(server.url, settings)
    assert SHARD not in whole(store)
    store.path(OTHER)  # makes room, and so clears what is left over
    assert whole(store) == [OTHER]
    assert store.path(SHARD).read_bytes() == (server.folder / SHARD).read_bytes()
    assert not list(folder.glob(begun))


def test_whoever_waits_for_a_killed_fetch_fetches_itself(server: HttpShards, settings: CacheSettings):
    server.fail(SHARD, Fault(stop=5000, wait=60))
    store = open_store(server.url, settings)
    with client(server, settings, f"store.path({SHARD!r})") as first:
        until(lambda: server.gets[SHARD] == 1)
        with client(server, settings, f"print(len(store.path({SHARD!r}).read_bytes()))") as second:
            time.sleep(0.5)
            assert server.gets[SHARD] == 1
            first.kill()
            output, errors = second.communicate(timeout=20)
    assert int(output) == (server.folder / SHARD).stat().st_size, errors
    assert server.gets[SHARD] == 2
    assert whole(store) == [SHARD]


def test_the_interpreter_ends_at_once_and_quietly_while_something_is_fetched_ahead(
    server: HttpShards, settings: CacheSettings
):
    server.fail(SHARD, Fault(stop=5000, wait=60))
    then = f"""
import time
store.fetch_ahead([{SHARD!r}, {OTHER!r}])
while not list(store.index_folder.glob("*.part")):
    time.sleep(0.01)
"""
    with client(server, settings, then) as process:
        until(lambda: server.gets[SHARD] == 1)
        start = time.monotonic()
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (0, "", "")
    assert time.monotonic() - start < 5
    assert server.gets[OTHER] == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 KiB."""
    with small_disk(tmp_path / "disk", "100k") as folder:
        yield folder


def test_a_disk_that_is_full_is_named_and_nothing_half_written_stays(server: HttpShards, disk: Path):
    store = open_store(server.url, CacheSettings(folder=disk / "cache"))
    last = "d-train-000002.tar"
    store.path(SHARD)
    store.path(OTHER)
    with pytest.raises(UserError, match=rf"no space left for {last} .* lower data\.cache\.size_gb") as caught:
        store.path(last)
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC
    assert str(store.index_folder) in str(caught.value)
    assert server.gets[last] == 1
    assert whole(store) == [SHARD, OTHER]
    store.fetch_ahead([last])
    until(lambda: server.gets[last] == 2)
    assert mount("-o", "remount,size=1m", str(disk)) == 0
    assert store.path(last).read_bytes() == (server.folder / last).read_bytes()
    assert whole(store) == [SHARD, OTHER, last]


def test_a_failure_ahead_is_logged_and_met_again_by_the_reader(
    server: HttpShards, store: ShardStore, caplog: pytest.LogCaptureFixture
):
    (server.folder / SHARD).unlink()
    store.fetch_ahead([SHARD, OTHER])
    until((store.index_folder / OTHER).is_file)
    assert f"not fetched ahead: {server.url}/{SHARD}: no such file" in caplog.text
    with pytest.raises(FileNotFoundError):
        store.path(SHARD)


def test_a_cache_that_was_cleared_in_the_middle_is_made_again(server: HttpShards, store: ShardStore):
    store.path(SHARD)
    shutil.rmtree(store.index_folder)
    assert store.path(SHARD).read_bytes() == (server.folder / SHARD).read_bytes()
