from __future__ import annotations

import hashlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from medsam2.data import cache as module
from medsam2.data.ahead import AheadThread
from medsam2.data.cache import Expected, ShardCache, locked, plain_name
from medsam2.errors import UserError

ANY = Expected()


def sized(count: int) -> Callable[[Path], None]:
    return lambda part: part.write_bytes(b"x" * count) and None


def never(part: Path) -> None:
    raise AssertionError(f"{part} is fetched again")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardCache:
    """Room for 1000 bytes."""
    monkeypatch.setattr(module, "GRACE", 0.005)
    return ShardCache(tmp_path / "cache", "s3://bucket/shards", 1000)


def age(cache: ShardCache, shard: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(cache.place / shard, (then, then))


def test_a_shard_is_fetched_once_and_found_afterwards(cache: ShardCache):
    assert cache.find("a.tar", Expected(300)) is None
    path = cache.fetch("a.tar", Expected(300), sized(300))
    assert path.read_bytes() == b"x" * 300
    assert cache.fetch("a.tar", Expected(300), never) == cache.find("a.tar", Expected(300)) == path


def test_the_least_recently_used_shard_goes_first(cache: ShardCache):
    for shard, seconds in (("a.tar", 30), ("b.tar", 20), ("c.tar", 10)):
        cache.fetch(shard, Expected(300), sized(300))
        age(cache, shard, seconds)
    cache.find("a.tar", ANY)  # used: now b is the oldest
    cache.fetch("d.tar", Expected(300), sized(300))
    assert cache.shards() == ["a.tar", "c.tar", "d.tar"]
    cache.fetch("e.tar", Expected(600), sized(600))
    assert cache.shards() == ["d.tar", "e.tar"]


def test_the_limit_holds_over_all_urls_of_the_folder(cache: ShardCache):
    other = ShardCache(cache.folder, "gs://other/shards", 1000)
    for number in range(12):
        one = (cache, other)[number % 2]
        one.fetch(f"{number}.tar", Expected(250), sized(250))
        age(one, f"{number}.tar", 100 - number)
        assert 250 * (len(cache.shards()) + len(other.shards())) == min(1000, 250 * (number + 1))
    assert cache.shards() == ["10.tar", "8.tar"]
    assert other.shards() == ["11.tar", "9.tar"]


def test_nothing_else_in_the_folder_is_ever_deleted(cache: ShardCache, tmp_path: Path):
    (cache.folder / "mine").mkdir()
    kept = [cache.folder / "mine" / "a.tar", cache.folder / "b.tar", cache.place / "index.arrow"]
    for path in kept:
        path.write_bytes(b"x" * 5000)
    cache.fetch("c.tar", Expected(900), sized(900))
    cache.fetch("d.tar", Expected(900), sized(900))
    assert cache.shards() == ["d.tar"]
    assert all(path.stat().st_size == 5000 for path in kept)


def test_a_shard_that_is_read_stays_readable_when_it_is_evicted(cache: ShardCache):
    with open(cache.fetch("a.tar", Expected(900), sized(900)), "rb") as file:
        cache.fetch("b.tar", Expected(900), sized(900))
        assert cache.shards() == ["b.tar"]
        assert file.read() == b"x" * 900


def test_a_shard_larger_than_the_limit_is_fetched_with_a_warning(cache: ShardCache, caplog: pytest.LogCaptureFixture):
    cache.fetch("a.tar", Expected(300), sized(300))
    for _ in range(2):
        assert cache.fetch("b.tar", Expected(3000), sized(3000)).stat().st_size == 3000
        assert cache.shards() == ["b.tar"]
        cache.fetch("c.tar", Expected(100), sized(100))
        assert cache.shards() == ["c.tar"]
    assert [record.getMessage().count("data.cache.size_gb") for record in caplog.records] == [1]


def test_a_shard_of_unknown_size_makes_room_when_it_has_come(cache: ShardCache):
    cache.fetch("a.tar", ANY, sized(600))
    cache.fetch("b.tar", ANY, sized(600))
    assert cache.shards() == ["b.tar"]


def test_what_was_fetched_ahead_goes_last_and_of_it_first_what_is_needed_last(cache: ShardCache):
    for shard in ("first.tar", "second.tar", "third.tar"):
        assert cache.fetch_ahead(shard, Expected(250), sized(250))
    cache.fetch("used.tar", Expected(250), sized(250))
    cache.fetch("now.tar", Expected(250), sized(250))
    assert cache.shards() == ["first.tar", "now.tar", "second.tar", "third.tar"]
    cache.fetch("large.tar", Expected(500), sized(500))
    assert cache.shards() == ["first.tar", "large.tar", "second.tar"]


def test_fetching_ahead_never_takes_the_place_of_what_was_fetched_ahead(cache: ShardCache):
    cache.fetch("used.tar", Expected(250), sized(250))
    age(cache, "used.tar", 5)
    for shard in ("a.tar", "b.tar", "c.tar", "d.tar"):
        assert cache.fetch_ahead(shard, Expected(250), sized(250))  # d takes the place of used
    assert not cache.fetch_ahead("e.tar", Expected(250), never)
    assert cache.shards() == ["a.tar", "b.tar", "c.tar", "d.tar"]
    cache.find("a.tar", ANY)
    age(cache, "a.tar", 5)
    assert cache.fetch_ahead("e.tar", Expected(250), sized(250))
    assert cache.shards() == ["b.tar", "c.tar", "d.tar", "e.tar"]


def test_a_shard_whose_path_was_just_given_is_not_taken_away_before_it_is_opened(
    cache: ShardCache, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "GRACE", 0.3)
    cache.fetch("a.tar", Expected(900), sized(900))
    start = time.monotonic()
    path = cache.find("a.tar", ANY)
    assert path is not None
    thread = threading.Thread(target=cache.fetch, args=("b.tar", Expected(900), sized(900)))
    thread.start()
    time.sleep(0.05)
    assert path.exists()
    thread.join()
    assert not path.exists()
    assert time.monotonic() - start >= 0.3


def test_bytes_that_are_on_their_way_count(cache: ShardCache):
    def get(part: Path) -> None:
        cache.fetch("old.tar", Expected(300), sized(300))
        age(cache, "old.tar", 50)
        cache.fetch("new.tar", Expected(300), sized(300))  # 500 are on their way: only one of the two has room
        assert cache.shards() == ["new.tar"]
        part.write_bytes(b"x" * 500)

    cache.fetch("large.tar", Expected(500), get)
    assert cache.shards() == ["large.tar", "new.tar"]


def test_a_part_of_a_dead_fetch_is_removed_and_one_of_a_live_fetch_is_kept(cache: ShardCache):
    dead, live = cache.place / "dead.tar.400.part", cache.place / "live.tar.400.part"
    dead.write_bytes(b"half")
    live.write_bytes(b"half")
    with locked(cache.place / "live.tar.lock"):
        cache.fetch("a.tar", Expected(300), sized(300))
    assert (dead.exists(), live.exists()) == (False, True)


def test_a_failed_fetch_leaves_nothing_and_the_next_one_works(cache: ShardCache):
    def broken(part: Path) -> None:
        part.write_bytes(b"half")
        raise OSError("the line is dead")

    with pytest.raises(OSError, match="the line is dead"):
        cache.fetch("a.tar", Expected(300), broken)
    assert [path.name for path in cache.place.iterdir()] == ["a.tar.lock"]
    assert cache.fetch("a.tar", Expected(300), sized(300)).stat().st_size == 300


def test_a_cached_file_of_another_size_is_fetched_again(cache: ShardCache):
    cache.fetch("a.tar", Expected(300), sized(300))
    os.truncate(cache.place / "a.tar", 200)
    assert cache.find("a.tar", Expected(300)) is None
    assert cache.fetch("a.tar", Expected(300), sized(300)).stat().st_size == 300


def test_threads_that_want_the_same_shard_fetch_it_once(cache: ShardCache):
    calls: list[Path] = []

    def slow(part: Path) -> None:
        calls.append(part)
        time.sleep(0.1)
        part.write_bytes(b"x" * 300)

    threads = [threading.Thread(target=cache.fetch, args=("a.tar", Expected(300), slow)) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert cache.fetch_ahead("a.tar", Expected(300), never)  # does not wait for the others
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_a_forked_child_does_not_keep_the_locks_of_its_parent(tmp_path: Path):
    path = tmp_path / "lock"
    with locked(path):
        child = os.fork()
        if child == 0:  # it must not have the lock file open, or the lock would outlive a parent that is killed
            descriptors = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
            os._exit(any(os.path.lexists(d) and os.readlink(d) == str(path) for d in descriptors))
        assert os.waitpid(child, 0)[1] == 0
        with locked(path, wait=False) as free:
            assert not free
    with locked(path, wait=False) as free:
        assert free


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd.tar", "/etc/x.tar", "a/b.tar", "..", "", ".hidden.tar", "a\0.tar", "index.arrow", "a\\b.tar"],
)
def test_a_shard_that_is_no_plain_file_name_is_refused(cache: ShardCache, name: str):
    for attempt in (lambda: plain_name(name), lambda: cache.find(name, ANY), lambda: cache.fetch(name, ANY, never)):
        with pytest.raises(UserError, match="not the plain name of a .tar file"):
            attempt()


def test_expected_tells_what_is_wrong(tmp_path: Path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"content")
    Expected(7, hashlib.sha256(b"content").hexdigest()).check(path)
    with pytest.raises(OSError, match="7 bytes came instead of 8"):
        Expected(8).check(path)
    with pytest.raises(OSError, match="sha256 ed7002b439e9... instead of 000000000000... of index.json"):
        Expected(7, "0" * 64).check(path)


def test_the_latest_wishes_win_and_stale_ones_are_dropped():
    done: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def fetch(name: str) -> bool:
        begun.set()
        assert go_on.wait(10)
        done.append(name)
        return True

    ahead = AheadThread(lambda names: names, fetch)
    ahead.wish(["a", "b", "c"])
    assert begun.wait(10)
    ahead.wish(["x"])
    ahead.wish(["c", "d", "d", "c"])
    go_on.set()
    end = time.monotonic() + 10
    while len(done) < 3 and time.monotonic() < end:
        time.sleep(0.005)
    assert done == ["a", "c", "d"]


def test_a_failing_wish_is_logged_once_and_the_others_are_fetched(caplog: pytest.LogCaptureFixture):
    done: list[str] = []

    def fetch(name: str) -> bool:
        if name == "bad":
            raise OSError("no such host")
        done.append(name)
        return True

    ahead = AheadThread(lambda names: [name for name in names if name not in done], fetch)
    for number in range(5):
        ahead.wish(["bad", f"good{number}"])
        end = time.monotonic() + 10
        while f"good{number}" not in done and time.monotonic() < end:
            time.sleep(0.005)
    assert done == [f"good{number}" for number in range(5)]
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "not fetched ahead: no such host"
    ]


def test_a_forked_child_has_a_thread_of_its_own():
    reader, writer = os.pipe()
    begun, go_on = threading.Event(), threading.Event()

    def fetch(name: str) -> bool:
        begun.set()
        if name == "parent":
            assert go_on.wait(10)
        os.write(writer, name.encode())
        return True

    ahead = AheadThread(lambda names: names, fetch)
    ahead.wish(["parent"])
    assert begun.wait(10)
    child = os.fork()
    if child == 0:
        ahead.wish(["child"])
        time.sleep(10)  # killed long before
        os._exit(1)
    ready, _, _ = select.select([reader], [], [], 10)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    go_on.set()
    assert ready and os.read(reader, 100).startswith(b"child")
