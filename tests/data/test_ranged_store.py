"""Shards that are read by range: the same bytes, one request for each stretch, nothing but the index on the disk."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from http_shards import HttpShards

from medsam2.data import ranged_store
from medsam2.data.cache_settings import CacheSettings
from medsam2.data.catalog import Catalog
from medsam2.data.loader import StepDataset
from medsam2.data.open_files import OpenFiles, Stretch
from medsam2.data.plan import Plan
from medsam2.data.ranged_store import RangedStore
from medsam2.data.settings import DataSettings
from medsam2.data.store import CachedStore, StoreBytes, open_store
from medsam2.errors import UserError
from medsam2.shards.tar import BLOCK


@pytest.fixture
def settings(tmp_path: Path) -> CacheSettings:
    return CacheSettings(mode="ranges", folder=tmp_path / "cache")


@pytest.fixture
def store(server: HttpShards, settings: CacheSettings) -> RangedStore:
    found = open_store(server.url, settings)
    assert isinstance(found, RangedStore)
    return found


def stretches(folder: Path) -> list[Stretch]:
    """The first frame with its mask of each segment."""
    catalog, found = Catalog(folder), []
    for row in range(len(catalog)):
        where = catalog.location(row)
        start, end = int(where.frame_offset[0]), int(where.mask_offset[0] + where.mask_length[0])
        found.append(Stretch(where.shard, start, end - start, int(where.frame_length[0])))
    return found


def read(store: Any, wanted: Stretch) -> bytes:
    memory = bytearray(wanted.length)
    return bytes(memory[: store.read(wanted, memoryview(memory), OpenFiles())])


def expected(folder: Path, wanted: Stretch) -> bytes:
    return (folder / wanted.shard).read_bytes()[wanted.offset : wanted.offset + wanted.length]


def test_the_mode_decides_how_a_url_is_read(server: HttpShards, local: Path, settings: CacheSettings) -> None:
    by_range, whole = open_store(server.url, settings), open_store(server.url, CacheSettings(folder=settings.folder))
    assert isinstance(by_range, RangedStore) and by_range.remote and not by_range.whole
    assert isinstance(whole, CachedStore) and whole.remote and whole.whole
    assert not open_store(local, settings).remote


def test_each_stretch_is_one_request_and_nothing_but_the_index_is_kept(
    server: HttpShards, local: Path, store: RangedStore
) -> None:
    before, wanted = server.sent, stretches(local)
    for stretch in wanted:
        assert read(store, stretch) == expected(local, stretch)
    gets = {path.name: server.gets[path.name] for path in local.glob("*.tar")}
    assert sum(gets.values()) == len(wanted) and all(server.ranged[name] == count for name, count in gets.items())
    assert server.sent - before == sum(stretch.length + BLOCK for stretch in wanted)
    assert not any(server.heads[path.name] for path in local.glob("*.tar")), "no shard is asked about"
    names = {path.name for path in store.index_folder.iterdir()}
    assert names == {"index.arrow", "index.json", "index.version", "index.lock"}


def test_memory_gives_the_same_bytes(local: Path, settings: CacheSettings) -> None:
    folder = f"/{uuid4()}"
    fsspec.filesystem("memory").put(f"{local}/", f"{folder}/", recursive=True)
    store = open_store(f"memory:/{folder}", settings)
    wanted = stretches(local)
    store.expect(wanted)
    assert all(read(store, stretch) == expected(local, stretch) for stretch in wanted)
    last = wanted[-1]._replace(length=1 << 20)
    assert read(store, last) == expected(local, last), "what ends before ends with the shard"
    fsspec.filesystem("memory").rm(folder, recursive=True)


def test_what_is_expected_is_asked_for_together_and_once(server: HttpShards, local: Path, store: RangedStore) -> None:
    wanted = stretches(local)[:9]
    assert len(set(wanted)) == 9
    assert read(store, wanted[8]) == expected(local, wanted[8])
    server.pause = 0.5
    start = time.monotonic()
    store.expect(wanted[:8])
    assert time.monotonic() - start < 0.4, "it does not wait"
    assert [read(store, stretch) for stretch in wanted[:8]] == [expected(local, stretch) for stretch in wanted[:8]]
    assert time.monotonic() - start < 8 * 0.5 / 2
    assert sum(server.ranged.values()) == 9
    assert read(store, wanted[0]) == expected(local, wanted[0]), "a second time by a request of its own"
    assert sum(server.ranged.values()) == 10


def test_no_more_is_under_way_than_the_memory_may_hold(
    server: HttpShards, local: Path, store: RangedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = stretches(local)
    server.pause = 0.02
    store.expect(wanted)
    assert len(store._asked) == 1, "until it is known that the server gives ranges, and not files of many megabytes"
    monkeypatch.setattr(ranged_store, "AT_ONCE", 3)
    read(store, wanted[0])
    assert len(store._asked) == 3
    monkeypatch.setattr(ranged_store, "MEMORY", wanted[0].length + 1)
    store.expect(wanted)
    for stretch in wanted:
        assert len(store._asked) == 1, "one at least"
        assert read(store, stretch) == expected(local, stretch)
    assert not store._asked and not store._queue


def test_what_was_expected_before_is_forgotten(server: HttpShards, local: Path, store: RangedStore) -> None:
    wanted = stretches(local)
    read(store, wanted[6])
    server.pause = 0.05
    store.expect(wanted[:4])
    store.expect(wanted[4:6])
    assert list(store._asked) == wanted[4:6]
    assert read(store, wanted[5]) == expected(local, wanted[5])
    assert read(store, wanted[0]) == expected(local, wanted[0])


def test_frames_inside_of_larger_members_cost_one_question_a_shard(
    server: HttpShards, local: Path, store: RangedStore
) -> None:
    """Arrays of other tools: no header of a tar stands before such a frame."""
    inside = [s._replace(offset=s.offset + 7, length=50, first=50) for s in stretches(local)]
    for stretch in inside * 2:
        assert read(store, stretch) == expected(local, stretch)
    assert all(server.heads[path.name] == 1 for path in local.glob("*.tar"))


def test_the_index_cannot_lead_out_of_the_folder(store: RangedStore) -> None:
    for expect in (False, True):
        with pytest.raises(UserError, match="not the plain name"):
            store.expect([Stretch("../x.tar", 512, 10)] if expect else [])
            read(store, Stretch("../x.tar", 512, 10))


def test_bytes_of_whole_segments_come_by_name_offset_and_length(local: Path, store: RangedStore) -> None:
    content = (local / "d-train-000000.tar").read_bytes()
    by_name = pickle.loads(pickle.dumps(StoreBytes(store)))
    assert by_name("d-train-000000.tar", 512, 3000) == content[512:3512]
    assert by_name("d-train-000000.tar", len(content) - 5, 100) == content[-5:]


def _in_child(store: RangedStore, wanted: list[Stretch], results: Any) -> None:
    store.expect(wanted[1:])
    results.put([read(store, stretch) for stretch in wanted])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_another_process_makes_requests_of_its_own(start: str, local: Path, store: RangedStore) -> None:
    wanted = stretches(local)
    store.expect(wanted)  # the parent has an event loop and requests under way when it forks
    context = multiprocessing.get_context(start)
    results = context.Queue()
    worker = context.Process(target=_in_child, args=(store, wanted, results))
    worker.start()
    assert results.get(timeout=30) == [expected(local, stretch) for stretch in wanted]
    worker.join(10)
    assert worker.exitcode == 0
    assert [read(store, stretch) for stretch in wanted] == [expected(local, stretch) for stretch in wanted]


def test_all_segments_are_shuffled_and_no_shard_is_fetched_ahead(server: HttpShards, settings: CacheSettings) -> None:
    for mode, by_blocks in (("ranges", False), ("shards", True)):
        own = DataSettings(shards=(server.url,), cache=settings.model_copy(update={"mode": mode}), clip_frames=3)
        plan = Plan((Catalog(open_store(server.url, own.cache)),), own, seed=3, global_batch=4)
        assert all((source.shards is not None) == by_blocks for source in plan.sources)
        assert (StepDataset(plan).ahead is not None) == by_blocks
