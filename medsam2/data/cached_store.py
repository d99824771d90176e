"""A folder behind a URL whose shards are fetched whole into a local cache (`data.cache.mode=shards`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from medsam2.data.ahead import AheadThread
from medsam2.data.cache import Expected, plain_name
from medsam2.data.cache_settings import CacheSettings
from medsam2.data.open_files import OpenFiles, Stretch
from medsam2.data.remote import Remote, unreachable_stops
from medsam2.data.remote_index import RemoteIndex


class CachedStore:
    """The index is fetched at once, a shard when it is needed or before.

    Raises:
        UserError: as `open_store`.
    """

    remote = True
    whole = True
    gap = 1 << 16

    def __init__(self, url: str, settings: CacheSettings) -> None:
        self.where = url
        self._remote = Remote(url, settings.attempts)
        self.shown = self._remote.shown
        self._index = RemoteIndex(self._remote, settings)
        self._cache, self._expected = self._index.cache, self._index.expected
        self.index_folder = self._index.folder
        self._ahead = AheadThread(self._missing, self._fetch_ahead)

    def read(self, wanted: Stretch, view: memoryview, files: OpenFiles) -> int:
        return files.read(self, wanted, view)

    def path(self, shard: str) -> Path:
        """The local file of a whole shard, fetched first where it is not there.

        Raises:
            OSError: it does not exist, or is not what the index describes: it is damaged for good.
            UserError: it cannot be reached; `shard` is not the plain name of a tar.
        """
        found = self._cache.find(shard, self._expected.get(shard, Expected()))
        if found is not None:
            return found
        with unreachable_stops():
            expected = self._described(shard)
            return self._cache.fetch(shard, expected, self._getter(shard, expected, None))

    def named(self, shard: str) -> str:
        return str(self.index_folder / shard)

    def expect(self, wanted: Sequence[Stretch]) -> None:
        """Nothing to do: shards are fetched ahead."""

    def fetch_ahead(self, shards: Sequence[str]) -> None:
        self._ahead.wish(shards)

    def _missing(self, shards: Sequence[str]) -> list[str]:
        """Those that are not in the cache; the others are kept for their use."""
        return [s for s in shards if self._cache.find(s, self._expected.get(s, Expected()), ahead=True) is None]

    def _fetch_ahead(self, shard: str) -> bool:
        expected = self._described(shard)
        # one attempt: who needs the shard meanwhile waits for this one, and then makes all attempts itself
        return self._cache.fetch_ahead(shard, expected, self._getter(shard, expected, 1))

    def _described(self, shard: str) -> Expected:
        """What the index says, or where that says nothing (tars of other tools) the size that the other side tells."""
        return self._expected.get(shard) or Expected(self._remote.size(plain_name(shard)))

    def _getter(self, shard: str, expected: Expected, attempts: int | None) -> Callable[[Path], None]:
        return lambda part: self._remote.copy(shard, part, expected.check, attempts)
