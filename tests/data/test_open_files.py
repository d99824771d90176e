"""Descriptors of shards: few at a time, none of a parent's, none of a file that is gone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medsam2.data.open_files import OPEN_FILES, OpenFiles, Stretch
from medsam2.data.store import LocalStore


def test_a_stretch_is_read_into_the_given_memory_and_ends_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(range(100)))
    files, store, memory = OpenFiles(), LocalStore(tmp_path), bytearray(30)
    assert store.read(Stretch("a.tar", 10, 30), memoryview(memory), files) == 30
    assert memory == bytes(range(10, 40))
    assert store.read(Stretch("a.tar", 90, 30), memoryview(memory), files) == 10
    assert store.read(Stretch("a.tar", 200, 30), memoryview(memory), files) == 0
    with pytest.raises(FileNotFoundError):
        store.read(Stretch("b.tar", 0, 1), memoryview(memory)[:1], files)
    files.close()


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    files, store = OpenFiles(), LocalStore(tmp_path)
    names = [f"{number}.tar" for number in range(OPEN_FILES + 5)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes([number]))
        assert os.pread(files.descriptor(store, name), 1, 0) == bytes([number])
        files.descriptor(store, names[0])  # kept, since it is used again and again
    shards = [shard for _, shard in files.open]
    assert len(shards) == OPEN_FILES and names[0] in shards and names[1] not in shards
    kept = list(files.open.values())
    files.close()
    for descriptor in kept:
        with pytest.raises(OSError):
            os.fstat(descriptor)


def test_a_shard_that_the_cache_deleted_is_closed_with_the_next_opening(tmp_path: Path) -> None:
    files, store = OpenFiles(), LocalStore(tmp_path)
    for name in "abc":
        (tmp_path / f"{name}.tar").write_bytes(b"x")
    gone = files.descriptor(store, "a.tar")
    (tmp_path / "a.tar").unlink()
    assert files.descriptor(store, "a.tar") == gone, "what is open can still be read"
    files.descriptor(store, "b.tar")
    assert [shard for _, shard in files.open] == ["b.tar"]
    files.close()


def test_a_forked_process_opens_its_own_files(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x")
    files, store = OpenFiles(), LocalStore(tmp_path)
    before = files.descriptor(store, "a.tar")
    files._process = -1  # what a forked child sees
    after = files.descriptor(store, "a.tar")
    assert after != before and os.pread(before, 1, 0) == b"x", "the parent's descriptor stays open"
    os.close(before)
    files.close()
