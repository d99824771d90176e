"""Where a folder of shards is: a local folder, or any fsspec URL, read through a local cache or by range.

The rest of `data/` asks a store for stretches of bytes and does not know which kind it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from medsam2.data.cache import plain_name
from medsam2.data.cache_settings import CacheSettings
from medsam2.data.cached_store import CachedStore
from medsam2.data.open_files import OpenFiles, Stretch
from medsam2.data.ranged_store import RangedStore
from medsam2.shards.index import SegmentIndex, read_index
from medsam2.shards.target import is_local, open_url


class ShardStore(Protocol):
    """Access to one folder of shards. Picklable: workers that are started by spawn open it anew."""

    where: str
    """The folder or URL as it was given; a URL may hold a password or a signature."""
    shown: str
    """The same for messages and logs, without secrets."""
    remote: bool
    whole: bool
    """Whether shards are fetched whole before anything of them is read: the plan then keeps to few at a time."""
    gap: int
    """Bytes between two members that are cheaper to read than to skip."""
    index_folder: Path
    """A local folder that holds `index.arrow` (and `index.json` where there is one)."""

    def read(self, wanted: Stretch, view: memoryview, files: OpenFiles) -> int:
        """Bytes of a shard into `view`; how many came: fewer than asked for only where the shard ends.

        Args:
            view: of `wanted.length` bytes. files: the caller's own, for shards that are files of this machine.

        Raises:
            OSError: the shard does not exist, or is not what the index describes: it is damaged for good.
            UserError: it cannot be reached, or not be read in this way; `shard` is not the plain name of a tar.
        """
        ...

    def named(self, shard: str) -> str:
        """A shard in messages: its file, or its URL without secrets."""
        ...

    def expect(self, wanted: Sequence[Stretch]) -> None:
        """What is read next, in this order, and nothing of what was expected before; returns at once."""
        ...

    def fetch_ahead(self, shards: Sequence[str]) -> None:
        """Shards that will be needed soon, the next first; returns at once, does nothing unless they come `whole`."""
        ...


def open_store(where: str | Path, cache: CacheSettings) -> ShardStore:
    """The shards of a local folder, a file:// URL, or any other fsspec URL.

    Raises:
        UserError: a URL whose protocol is not known or whose package is not installed; a remote folder without an
            index, or one that cannot be reached while the cache holds no index of it.
    """
    text = str(where)
    if "://" not in text:
        return LocalStore(where)
    if text.startswith(("file:", "local:")):
        filesystem, root = open_url(text)
        if is_local(filesystem):
            return LocalStore(root)
    return RangedStore(text, cache) if cache.mode == "ranges" else CachedStore(text, cache)


class LocalStore:
    """A folder of this machine."""

    remote = False
    whole = False
    gap = 1 << 16

    def __init__(self, folder: Path | str) -> None:
        self.where = self.shown = str(folder)
        self.index_folder = Path(folder)

    def read(self, wanted: Stretch, view: memoryview, files: OpenFiles) -> int:
        return files.read(self, wanted, view)

    def path(self, shard: str) -> Path:
        """The file of a shard.

        Raises:
            UserError: `shard` is not the plain name of a tar.
        """
        return self.index_folder / plain_name(shard)

    def named(self, shard: str) -> str:
        return str(self.index_folder / shard)

    def expect(self, wanted: Sequence[Stretch]) -> None:
        """Nothing to do."""

    def fetch_ahead(self, shards: Sequence[str]) -> None:
        """Nothing to do."""


class StoreBytes:
    """Bytes of a store's shards by name, offset and length, for readers of whole segments. Picklable."""

    def __init__(self, store: ShardStore) -> None:
        self.store = store

    def __call__(self, shard: str, offset: int, length: int) -> bytes:
        """Fewer bytes than asked for where the shard ends.

        Raises:
            OSError, UserError: as `ShardStore.read`.
        """
        content, files = bytearray(length), OpenFiles()
        try:
            done = self.store.read(Stretch(shard, offset, length), memoryview(content), files)
        finally:
            files.close()
        return bytes(memoryview(content)[:done])


def store_index(store: ShardStore) -> SegmentIndex:
    """The index of a store, whose segments are read through it.

    Raises:
        UserError: no index, or not a readable one.
    """
    return read_index(store.index_folder, StoreBytes(store) if store.remote else None)
