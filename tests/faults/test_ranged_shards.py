"""Faults of the other side while clips are read by range: what cannot be had in this way is said, never guessed."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from http_shards import Fault, HttpShards
from small_shards import SCANS, build

from medsam2.data import remote
from medsam2.data.batch import ClipBatch
from medsam2.data.cache_settings import CacheSettings
from medsam2.data.catalog import Catalog
from medsam2.data.entry import PlanEntry
from medsam2.data.reader import BatchReader, DamagedSegment
from medsam2.data.store import ShardStore, open_store
from medsam2.errors import UserError

SHARD, OTHER = "d-train-000000.tar", "d-train-000001.tar"
IN_SHARD, IN_OTHER = 0, 4  # rows of the index


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HttpShards]:
    with HttpShards(build(tmp_path / "local")) as server:
        yield server


@pytest.fixture
def store(server: HttpShards, tmp_path: Path) -> ShardStore:
    return open_store(server.url, CacheSettings(mode="ranges", folder=tmp_path / "cache"))


def entry(row: int, frames: tuple[int, ...] = (0, 1, 2)) -> PlanEntry:
    return PlanEntry(0, row, frames, (0,), seed=1, position=0)


def read(store: ShardStore | Path, *rows: int, substitute: int | None = None) -> ClipBatch:
    other = None if substitute is None else lambda wanted: replace(wanted, row=substitute)
    return BatchReader([Catalog(store)], other).read([entry(row) for row in rows], 0)


def assert_right(server: HttpShards, found: ClipBatch, *rows: int) -> None:
    expected = read(server.folder, *rows)
    assert found.keys == expected.keys
    np.testing.assert_array_equal(found.frames.numpy(), expected.frames.numpy())
    np.testing.assert_array_equal(found.masks.numpy(), expected.masks.numpy())


def test_a_server_that_ignores_ranges_ends_the_run_with_the_remedy_at_the_first_read(
    server: HttpShards, store: ShardStore
) -> None:
    server.ranges = "ignored"
    total = (server.folder / SHARD).stat().st_size
    remedy = rf"{server.url}/{SHARD}: {total} bytes came where .* asked for: .* set data\.cache\.mode=shards"
    with pytest.raises(UserError, match=remedy) as caught:
        read(store, IN_SHARD, *range(1, 9), substitute=IN_OTHER)
    assert not isinstance(caught.value, DamagedSegment), "other samples are not drawn for it"
    assert server.ranged.total() == 1, "neither is it tried again, nor are more whole files on their way"


def test_a_server_that_gives_less_than_asked_for_ends_the_run_with_the_remedy(
    server: HttpShards, store: ShardStore
) -> None:
    server.ranges = "half"
    with pytest.raises(UserError, match=r"bytes came where .* asked for: .* set data\.cache\.mode=shards") as caught:
        read(store, IN_SHARD, substitute=IN_OTHER)
    assert not isinstance(caught.value, DamagedSegment)


@pytest.mark.parametrize("ranges", ["given", "ignored"])
@pytest.mark.parametrize("described", [True, False])
def test_a_shard_that_ends_before_is_damaged(
    ranges: str, described: bool, server: HttpShards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not described:
        (server.folder / "index.json").unlink()
    store = open_store(server.url, CacheSettings(mode="ranges", folder=tmp_path / "cache"))
    where = Catalog(store).location(IN_SHARD)
    os.truncate(server.folder / SHARD, int(where.frame_offset[1]) + 3)
    server.ranges = "given" if described else ranges  # type: ignore[assignment]
    if ranges == "ignored" and not described:  # what comes is shorter than asked for, and yet not the end of the file
        with pytest.raises(UserError, match=r"data\.cache\.mode=shards"):
            read(store, IN_SHARD)
        return
    reason = r"bytes at the other side instead of \d+ in index\.json" if described else f"3 of {where.frame_length[1]}"
    with pytest.raises(DamagedSegment, match=rf"{server.url}/{SHARD}: segment .*{reason}"):
        read(store, IN_SHARD)
    found = read(store, IN_SHARD, substitute=IN_OTHER)
    assert len(found.lost) == 1 and "skipped and replaced" in caplog.text
    assert_right(server, replace(found, lost=()), IN_OTHER)


def test_a_stretch_that_begins_behind_the_end_is_damaged_too(server: HttpShards, tmp_path: Path) -> None:
    (server.folder / "index.json").unlink()
    store = open_store(server.url, CacheSettings(mode="ranges", folder=tmp_path / "cache"))
    os.truncate(server.folder / SHARD, 100)
    with pytest.raises(DamagedSegment, match="0 of [0-9]+ bytes"):
        read(store, IN_SHARD)


def test_a_missing_shard_is_damaged_and_asked_for_once_more_at_most(server: HttpShards, store: ShardStore) -> None:
    (server.folder / SHARD).unlink()
    with pytest.raises(DamagedSegment, match=rf"{server.url}/{SHARD}: segment .*no such file"):
        read(store, IN_SHARD)
    assert server.gets[SHARD] <= 2
    assert len(read(store, IN_SHARD, substitute=IN_OTHER).lost) == 1


def test_a_shard_that_was_replaced_while_the_run_goes_on_is_said_to_be(server: HttpShards, store: ShardStore) -> None:
    assert_right(server, read(store, IN_SHARD), IN_SHARD)
    other = build(server.folder.parent / "other", [SCANS[3], *SCANS[:1], *SCANS[1:3]])
    (server.folder / OTHER).write_bytes(b"\0" * 512 + (other / OTHER).read_bytes())
    described = json.loads((server.folder / "index.json").read_text())["shards"][OTHER]["bytes"]
    for _ in range(2):
        with pytest.raises(DamagedSegment, match=rf"instead of {described} in index\.json: it was replaced or cut"):
            read(store, IN_OTHER)
    assert server.heads[OTHER] == 1 and server.heads[SHARD] == 0


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
    text = rf"{server.url}/{SHARD}: .*Connect.*\(after 4 attempts\)\. The run can go on with resume=auto"
    with pytest.raises(UserError, match=text) as caught:
        read(store, IN_SHARD, substitute=IN_OTHER)
    assert not isinstance(caught.value, DamagedSegment)


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


def test_what_keeps_failing_is_an_error_and_access_denied_is_one_at_once(server: HttpShards, store: ShardStore) -> None:
    server.fail(SHARD, *[Fault(503)] * 9)
    with pytest.raises(UserError, match=rf"{server.url}/{SHARD}: .*503.*\(after 4 attempts\)"):
        read(store, IN_SHARD, substitute=IN_OTHER)
    server.fail(OTHER, *[Fault(403)] * 9)
    with pytest.raises(UserError, match=rf"{server.url}/{OTHER}: .*403"):
        read(store, IN_OTHER, substitute=IN_SHARD)
    assert server.gets[OTHER] == 2


def test_a_server_that_falls_silent_is_left_after_a_while(
    server: HttpShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "SILENCE", 0.2)
    store = open_store(server.url, CacheSettings(mode="ranges", folder=tmp_path / "cache"))
    server.fail(SHARD, *[Fault(stop=900, wait=30)] * 2)
    start = time.monotonic()
    assert_right(server, read(store, IN_SHARD), IN_SHARD)
    assert 0.4 <= time.monotonic() - start < 5


def test_a_query_is_sent_with_every_range_and_shown_nowhere(
    server: HttpShards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="medsam2")
    cache = CacheSettings(mode="ranges", folder=tmp_path / "cache")
    store = open_store(f"{server.url}?signature=secret", cache)
    server.fail(SHARD, *[Fault(503)] * 2)
    read(store, IN_SHARD)
    said = [caplog.text]
    for fault, name in ((Fault(500), SHARD), (Fault(403), OTHER), (Fault(404), OTHER)):
        server.fail(name, *[fault] * 5)
        with pytest.raises(UserError) as caught:
            read(store, IN_SHARD if name == SHARD else IN_OTHER)
        said.append(str(caught.value))
    server.faults.clear()
    server.ranges = "ignored"
    with pytest.raises(UserError, match="mode=shards") as caught:
        read(store, IN_SHARD)
    assert set(server.queries) == {"signature=secret"}
    assert not re.search("secret", "".join([*said, str(caught.value)])) and "tried again" in said[0]


CLIENT = """
import sys, time
from medsam2.data.cache_settings import CacheSettings
from medsam2.data.open_files import Stretch
from medsam2.data.store import open_store
store = open_store(sys.argv[1], CacheSettings(mode="ranges", folder=sys.argv[2]))
store._proved = True
store.expect([Stretch("{shard}", 512 * n, 900) for n in range(1, 6)])
time.sleep(0.3)
"""


def test_the_interpreter_ends_at_once_and_quietly_while_answers_are_due(server: HttpShards, tmp_path: Path) -> None:
    server.fail(SHARD, *[Fault(stop=100, wait=60)] * 5)
    command = [sys.executable, "-c", CLIENT.format(shard=SHARD), server.url, str(tmp_path / "cache")]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=40)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and server.gets[SHARD] == 5
    assert time.monotonic() - start < 20
