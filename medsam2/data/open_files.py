"""Stretches of shards, and the descriptors by which those of this machine are read."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple, Protocol

OPEN_FILES = 32  # descriptors kept open by each reader


class Stretch(NamedTuple):
    """Bytes of a shard that are read at once: neighbouring members of the tar.

    Attributes:
        offset, length: in bytes.
        first: bytes of the member that begins at `offset`, by which a store that reads over a network sees that the
            shard is still the one of the index; 0: not known.
    """

    shard: str
    offset: int
    length: int
    first: int = 0


class Located(Protocol):
    """A store whose shards are files of this machine."""

    where: str

    def path(self, shard: str) -> Path: ...


class OpenFiles:
    """Open shards, the least recently used closed first. Files are opened anew after a fork."""

    def __init__(self) -> None:
        self.open: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._process = os.getpid()

    def read(self, store: Located, wanted: Stretch, view: memoryview) -> int:
        """Bytes of a shard into `view`; how many came: fewer than asked for only where the file ends.

        Raises:
            OSError: the shard does not exist, or cannot be read.
        """
        descriptor, done = self.descriptor(store, wanted.shard), 0
        while done < wanted.length:
            count = os.preadv(descriptor, [view[done:]], wanted.offset + done)
            if not count:
                break
            done += count
        return done

    def descriptor(self, store: Located, shard: str) -> int:
        """The descriptor of a shard, fetched and opened if it is not open yet.

        Raises:
            OSError: it does not exist, or could not be fetched.
        """
        if self._process != os.getpid():  # after a fork: leave the parent's descriptors alone
            self.open, self._process = OrderedDict(), os.getpid()
        key = (store.where, shard)
        if key not in self.open:
            self._make_room()
            self.open[key] = os.open(store.path(shard), os.O_RDONLY | os.O_CLOEXEC)
        self.open.move_to_end(key)
        return self.open[key]

    def _make_room(self) -> None:
        """Close what a cache has deleted since, whose space is free only then, and the least recently used."""
        for key in [key for key, descriptor in self.open.items() if os.fstat(descriptor).st_nlink == 0]:
            os.close(self.open.pop(key))
        while len(self.open) >= OPEN_FILES:
            os.close(self.open.popitem(last=False)[1])

    def close(self) -> None:
        """Close what this process opened."""
        if self._process == os.getpid():
            for descriptor in self.open.values():
                os.close(descriptor)
        self.open.clear()
