"""Faults of the other side while clips are read by range: what cannot be had is said, never guessed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from http_shards import Fault, HttpShards
from small_shards import build

from medsam2.data.batch import ClipBatch
from medsam2.data.datamodule import ClipDataModule
from medsam2.data.plan.stream import PlanEntry
from medsam2.data.read import store as module
from medsam2.data.read.catalog import Catalog
from medsam2.data.read.reader import BatchReader, DamagedSegment
from medsam2.data.read.store import ShardStore, open_store
from medsam2.data.settings import DataSettings
from medsam2.errors import UserError

SHARD, OTHER = "d-train-000000.tar", "d-train-000001.tar"
IN_SHARD, IN_OTHER = 0, 4  # rows of the index


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HttpShards]:
    with HttpShards(build(tmp_path / "local")) as server:
        yield server


@pytest.fixture
def store(server: HttpShards) -> ShardStore:
    return open_store(server.url)


def read(store: ShardStore | Path, *rows: int, substitute: int | None = None) -> ClipBatch:
    other = None if substitute is None else lambda wanted: replace(wanted, row=substitute)
    entries = [PlanEntry(0, row, (0, 1, 2), (0,), seed=1, position=0) for row in rows]
    return BatchReader([Catalog(store)], other).read(entries, 0)


def assert_right(server: HttpShards, found: ClipBatch, *rows: int) -> None:
    expected = read(server.folder, *rows)
    assert found.keys == expected.keys
    np.testing.assert_array_equal(found.frames.numpy(), expected.frames.numpy())
    np.testing.assert_array_equal(found.masks.numpy(), expected.masks.numpy())


def test_a_server_that_ignores_ranges_is_refused_at_the_start_with_the_remedy(server: HttpShards) -> None:
    server.ignores_ranges = True
    with pytest.raises(UserError, match=rf"{server.url}: the server does not support byte ranges .*rclone"):
        open_store(server.url)


def test_a_login_page_in_place_of_the_index_is_recognised(server: HttpShards) -> None:
    (server.folder / "index.arrow").write_text("<html>who are you?</html>")
    with pytest.raises(UserError, match=rf"{server.url}: the index\.arrow that the server sends is not .*logging in"):
        open_store(server.url)


def test_a_damaged_index_is_an_error_with_the_address(server: HttpShards) -> None:
    (server.folder / "index.arrow").write_bytes((server.folder / "index.arrow").read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{server.url}: .*not a readable index"):
        open_store(server.url)


def test_a_folder_without_an_index_and_a_server_that_is_down_are_errors_with_the_remedy(server: HttpShards) -> None:
    (server.folder / "index.arrow").unlink()
    with pytest.raises(UserError, match=r"holds no index\.arrow; make shards with"):
        open_store(server.url)
    server.close()
    with pytest.raises(UserError, match=rf"{server.url}: the index cannot be fetched \(.*check the address"):
        open_store(server.url)


def test_an_index_that_is_cut_on_the_way_is_fetched_again(server: HttpShards) -> None:
    server.fail("index.arrow", Fault(), Fault(stop=100), Fault(503))
    store = open_store(server.url)
    assert (store.index_folder / "index.arrow").read_bytes() == (server.folder / "index.arrow").read_bytes()


@pytest.mark.parametrize(("bytes_left", "found"), [(100, "0"), (None, "3")])
def test_a_shard_that_ends_before_is_damaged(
    bytes_left: int | None, found: str, server: HttpShards, store: ShardStore, caplog: pytest.LogCaptureFixture
) -> None:
    where = Catalog(store).location(IN_SHARD)
    os.truncate(server.folder / SHARD, bytes_left or int(where.frame_offset[1]) + 3)
    with pytest.raises(DamagedSegment, match=rf"{server.url}/{SHARD}: segment .*{found} of [0-9]+ bytes"):
        read(store, IN_SHARD)
    batch = read(store, IN_SHARD, substitute=IN_OTHER)
    assert len(batch.damaged_keys) == 1 and "skipped and replaced" in caplog.text
    assert_right(server, replace(batch, damaged_keys=()), IN_OTHER)


@pytest.mark.parametrize("status", [404, 410])
def test_a_missing_shard_is_damaged(status: int, server: HttpShards, store: ShardStore) -> None:
    server.fail(SHARD, *[Fault(status)] * 9)
    with pytest.raises(DamagedSegment, match=rf"{server.url}/{SHARD}: segment .*no such file"):
        read(store, IN_SHARD)
    assert server.gets[SHARD] <= 2, "asked for once more at most"
    assert len(read(store, IN_SHARD, substitute=IN_OTHER).damaged_keys) == 1


def test_a_shard_with_other_bytes_of_the_same_size_is_damaged_not_decoded(
    server: HttpShards, store: ShardStore
) -> None:
    content = (server.folder / SHARD).read_bytes()
    (server.folder / SHARD).write_bytes(content[512:] + content[:512])
    with pytest.raises(DamagedSegment, match="Corrupt"):
        read(store, IN_SHARD)


def test_a_network_that_is_down_stops_the_run_with_the_reason(server: HttpShards, store: ShardStore) -> None:
    read(store, IN_SHARD)
    server.close()
    text = rf"{server.url}/{SHARD}: .*Connect.*\(after 4 attempts\)\. Continue the run with resume=auto"
    with pytest.raises(UserError, match=text) as caught:
        read(store, IN_SHARD, substitute=IN_OTHER)
    assert not isinstance(caught.value, DamagedSegment), "other samples are not drawn for it"


@pytest.mark.parametrize(
    "fault", [Fault(503), Fault(500), Fault(429), Fault(408), Fault(stop=0), Fault(stop=900)],
    ids=lambda fault: f"{fault.status}-{fault.stop}",
)  # fmt: skip
def test_what_fails_for_a_while_is_tried_again_until_it_is_right(
    fault: Fault, server: HttpShards, store: ShardStore
) -> None:
    server.fail(SHARD, *[fault] * 4)
    assert_right(server, read(store, IN_SHARD, IN_OTHER), IN_SHARD, IN_OTHER)
    assert server.gets[SHARD] == 5 and server.gets[OTHER] == 1


def test_pauses_grow_and_differ(server: HttpShards, store: ShardStore, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(module.time, "sleep", slept.append)
    server.fail(SHARD, *[Fault(503)] * 4)
    read(store, IN_SHARD)
    assert all(base * 0.5 <= pause <= base * 1.5 for pause, base in zip(slept, (1.0, 2.0, 4.0), strict=True))
    assert slept != [1.0, 2.0, 4.0]


def test_what_keeps_failing_is_an_error_and_access_denied_is_one_at_once(server: HttpShards, store: ShardStore) -> None:
    server.fail(SHARD, *[Fault(503)] * 9)
    with pytest.raises(UserError, match=rf"{server.url}/{SHARD}: .*503.*\(after 4 attempts\)"):
        read(store, IN_SHARD, substitute=IN_OTHER)
    server.fail(OTHER, *[Fault(403)] * 9)
    with pytest.raises(UserError, match=rf"{server.url}/{OTHER}: .*403"):
        read(store, IN_OTHER, substitute=IN_SHARD)
    assert server.gets[OTHER] == 2


def test_a_server_that_falls_silent_is_left_after_a_while(server: HttpShards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_SECONDS", 0.2)
    store = open_store(server.url)
    server.fail(SHARD, *[Fault(stop=900, wait=30)] * 2)
    start = time.monotonic()
    assert_right(server, read(store, IN_SHARD), IN_SHARD)
    assert 0.4 <= time.monotonic() - start < 10


def test_a_query_is_sent_with_every_request_and_shown_nowhere(
    server: HttpShards, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="medsam2")
    store = open_store(f"{server.url}?signature=secret")
    server.fail(SHARD, *[Fault(503)] * 2)
    read(store, IN_SHARD)
    messages = [caplog.text]
    for status in (500, 403, 404):
        server.fail(SHARD, *[Fault(status)] * 5)
        with pytest.raises(UserError) as caught:
            read(store, IN_SHARD)
        messages.append(str(caught.value))
    assert set(server.queries) == {"signature=secret"}
    assert "secret" not in "".join(messages) and "trying again" in messages[0]


def test_what_a_worker_meets_is_one_sentence(server: HttpShards, monkeypatch: pytest.MonkeyPatch) -> None:
    module_of_clips = ClipDataModule(DataSettings(shards=(server.url,), clip_frames=3, workers=1))
    loader = module_of_clips.train_dataloader()
    for shard in server.folder.glob("*.tar"):
        server.fail(shard.name, *[Fault(403)] * 99)
    with pytest.raises(UserError) as caught:
        next(iter(loader))
    assert str(caught.value).startswith(f"{server.url}/") and "\n" not in str(caught.value), "and no worker's traceback"
