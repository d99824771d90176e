"""A folder behind a URL of which only what clips need is fetched, by range (`data.cache.mode=ranges`).

Nothing but the index is kept. The ranges of a batch are asked for together, so that it waits about as long as one of
them takes; what fails in that way is asked for again, with all attempts, by the read that needs it.
"""

from __future__ import annotations

import atexit
import os
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from medsam2.data.cache import Expected, WrongContent, plain_name
from medsam2.data.cache_settings import CacheSettings
from medsam2.data.open_files import OpenFiles, Stretch
from medsam2.data.remote import Remote, unreachable_stops
from medsam2.data.remote_index import RemoteIndex
from medsam2.errors import UserError
from medsam2.shards.tar import BLOCK, member_size

AT_ONCE = 16  # requests of a process under way
MEMORY = 1 << 26  # bytes that they may hold
_OWN = ("_process", "_queue", "_asked", "_sizes", "_proved")  # of each process


class RangedStore:
    """The index is fetched at once, members of shards when they are read. Usable after a fork.

    Each range begins with the tar's header of its first member. Where that is not what the index says (another shard
    has taken its place; or a frame lies inside of a larger member, as in tars of other tools), the size of the shard
    is asked for, once in a process, and compared with `index.json`.

    Raises:
        UserError: as `open_store`.
    """

    remote = True
    whole = False
    gap = 1 << 20

    def __init__(self, url: str, settings: CacheSettings) -> None:
        self.where = url
        self._remote = Remote(url, settings.attempts)
        self.shown = self._remote.shown
        self._index = RemoteIndex(self._remote, settings)
        self.index_folder = self._index.folder
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._queue: deque[Stretch] = deque()
        self._asked: dict[Stretch, Future[bytes]] = {}
        self._sizes: dict[str, int | None] = {}
        self._proved = False
        _all.add(self)

    def read(self, wanted: Stretch, view: memoryview, files: OpenFiles) -> int:
        start, end = _bounds(wanted)
        with unreachable_stops():
            content = self._answer(wanted)
            if content is None:
                content = self._remote.read(plain_name(wanted.shard), start, end)
            self._check(wanted, content)
            self._proved = True
            self._ask()
        found = memoryview(content)[wanted.offset - start :]
        view[: len(found)] = found
        return len(found)

    def named(self, shard: str) -> str:
        return f"{self.shown}/{shard}"

    def expect(self, wanted: Sequence[Stretch]) -> None:
        self.forget()
        self._queue = deque(dict.fromkeys(wanted))
        self._ask()

    def fetch_ahead(self, shards: Sequence[str]) -> None:
        """Nothing to do: no shard is fetched."""

    def forget(self) -> bool:
        """Give up what is expected; whether anything was under way."""
        if self._process != os.getpid():  # after a fork: the answers come to the parent
            self._begin()
            return False
        under_way = [future for future in self._asked.values() if future.cancel()]
        self._asked.clear()
        self._queue.clear()
        return bool(under_way)

    def _ask(self) -> None:
        """Ask for what is expected, as much as may be under way: of one that may send whole files, a single request."""
        held, most = sum(stretch.length for stretch in self._asked), AT_ONCE if self._proved else 1
        while self._queue and len(self._asked) < most and (not held or held + self._queue[0].length <= MEMORY):
            stretch = self._queue.popleft()
            future = self._remote.ask(plain_name(stretch.shard), *_bounds(stretch))
            if future is None:
                self._queue.clear()
                return
            self._asked[stretch] = future
            held += stretch.length

    def _answer(self, wanted: Stretch) -> bytes | None:
        """What came for a stretch that was asked for; None: nothing, or an error, which another request may mend."""
        if self._process != os.getpid():
            self._begin()
        future = self._asked.pop(wanted, None)
        if future is None:
            return None
        try:
            return future.result()
        except Exception:  # fsspec packages have exceptions of their own; the read meets it again
            return None

    def _check(self, wanted: Stretch, content: bytes) -> None:
        """That an answer is what was asked for, of the shard that the index describes; it may end with the shard.

        Raises:
            WrongContent: the shard has another size than `index.json` says.
            UserError: the server answers with another part of the file.
        """
        start, end = _bounds(wanted)
        if len(content) == end - start and 0 < wanted.first == member_size(content[:BLOCK]):
            return
        size = self._size(wanted.shard)
        described = self._index.expected.get(wanted.shard, Expected()).size
        if size is not None and described is not None and size != described:
            raise WrongContent(
                f"{size} bytes at the other side instead of {described} in index.json: it was replaced or cut; "
                "start the run again, which fetches the index of now, or prepare the shards again"
            )
        there = end if size is None else min(end, max(start, size))
        if len(content) > end - start or (size is not None and len(content) != there - start):
            raise UserError(
                f"{self.named(wanted.shard)}: {len(content)} bytes came where {end - start} from byte {start} on were "
                "asked for: the server gives no ranges of files; set data.cache.mode=shards."
            )

    def _size(self, shard: str) -> int | None:
        """Bytes of a shard as the other side tells, asked for once."""
        if shard not in self._sizes:
            self._sizes[shard] = self._remote.size(shard)
        return self._sizes[shard]


def _bounds(wanted: Stretch) -> tuple[int, int]:
    """First byte and end of what is asked for: from the header before the stretch on."""
    return max(0, wanted.offset - BLOCK), wanted.offset + wanted.length


_all: weakref.WeakSet[RangedStore] = weakref.WeakSet()


def _forget_all() -> None:
    """The interpreter would complain of requests that are under way when it ends."""
    if any([store.forget() for store in list(_all)]):
        time.sleep(0.05)  # for the thread of the requests to take notice


atexit.register(_forget_all)
