"""Where a folder of shards is: a local folder, or any fsspec URL behind a local cache.

The rest of `data/` sees local files only: `path` gives the file of a shard, fetched first where it is remote.
"""

from __future__ import annotations

import filecmp
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from medsam2.data.ahead import AheadThread
from medsam2.data.cache import Expected, ShardCache, WrongContent, locked, plain_name
from medsam2.data.cache_settings import CacheSettings
from medsam2.data.remote import Remote
from medsam2.errors import UserError
from medsam2.files import atomic_path, atomic_write
from medsam2.shards.index import ARROW, JSON
from medsam2.shards.target import is_local, open_url

log = logging.getLogger(__name__)
VERSION = "index.version"


class ShardStore(Protocol):
    """Access to one folder of shards. Picklable: workers that are started by spawn open it anew."""

    where: str
    """The folder or URL as it was given; a URL may hold a password or a signature."""
    shown: str
    """The same for messages and logs, without secrets."""
    remote: bool
    index_folder: Path
    """A local folder that holds `index.arrow` (and `index.json` where there is one)."""

    def path(self, shard: str) -> Path:
        """A local file with the whole shard.

        Raises:
            OSError: it does not exist, or is not what the index describes: it is damaged for good.
            UserError: it cannot be reached; `shard` is not the plain name of a tar.
        """
        ...

    def fetch_ahead(self, shards: Sequence[str]) -> None:
        """Shards that will be needed soon, the next first; returns at once, does nothing where all is local."""
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
    return RemoteStore(text, cache)


class LocalStore:
    """A folder of this machine."""

    remote = False

    def __init__(self, folder: Path | str) -> None:
        self.where = self.shown = str(folder)
        self.index_folder = Path(folder)

    def path(self, shard: str) -> Path:
        return self.index_folder / plain_name(shard)

    def fetch_ahead(self, shards: Sequence[str]) -> None:
        """Nothing to do."""


class RemoteStore:
    """A folder behind a URL; its index is fetched at once, its shards when they are needed.

    Raises:
        UserError: as `open_store`.
    """

    remote = True

    def __init__(self, url: str, settings: CacheSettings) -> None:
        self.where = url
        self._remote = Remote(url, settings.attempts)
        self.shown = self._remote.shown
        folder = settings.folder or default_folder()
        try:
            self._cache = ShardCache(folder.expanduser().absolute(), self._remote.shown, int(settings.size_gb * 1e9))
        except OSError as error:
            raise UserError(f"{folder}: cannot hold the cache of shards ({error}); give data.cache.folder.") from None
        self.index_folder = self._cache.place
        self._expected = self._fetch_index()
        self._ahead = AheadThread(self._missing, self._fetch_ahead)

    def path(self, shard: str) -> Path:
        found = self._cache.find(shard, self._expected.get(shard, Expected()))
        if found is not None:
            return found
        try:
            expected = self._described(shard)
            return self._cache.fetch(shard, expected, self._getter(shard, expected, None))
        except (FileNotFoundError, WrongContent):
            raise
        except OSError as error:  # a network that is down must not look like damage: other samples would be drawn
            raise UserError(f"{error}. The run can go on with resume=auto when that is mended.") from error

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

    def _fetch_index(self) -> dict[str, Expected]:
        """Bring the cached index up to date; what it says of each shard."""
        self.index_folder.mkdir(parents=True, exist_ok=True)
        with locked(self.index_folder / "index.lock"):
            try:
                self._refresh()
            except FileNotFoundError:
                raise UserError(
                    f"{self._remote.shown}: holds no {ARROW}; make shards with `medsam2 prepare`, for tars that came "
                    "from elsewhere with --index-only."
                ) from None
            except OSError as error:
                if not (self.index_folder / ARROW).is_file():
                    raise UserError(
                        f"{self._remote.shown}: the index cannot be fetched ({error}), and none is in the cache "
                        f"{self.index_folder}; check the address, the network and your credentials."
                    ) from None
                log.warning("the index cannot be fetched (%s); the one in %s is used", error, self.index_folder)
            return _expectations(self.index_folder / JSON)

    def _refresh(self) -> None:
        """Fetch the index unless the cached one is that of the other side; drop shards that changed with it."""
        versions = {JSON: self._optional_version(), ARROW: self._remote.version(ARROW)}
        known = self.index_folder / VERSION
        cached = (self.index_folder / ARROW).is_file()
        if cached and versions[ARROW] is not None and _read_json(known) == versions:
            return
        known.unlink(missing_ok=True)  # whatever happens from here on, the next one looks again
        for left in self.index_folder.glob(".index.*.partial"):  # of a process that was killed
            left.unlink()
        path, summary = self.index_folder / ARROW, self.index_folder / JSON
        with ExitStack() as both:
            new = both.enter_context(atomic_path(path))
            self._copy_index(ARROW, new, versions[ARROW])
            told = None
            if versions[JSON] != {}:
                told = both.enter_context(atomic_path(summary))
                self._copy_index(JSON, told, versions[JSON])
            # before the new index is there: a kill in between must not leave old shards with it
            self._drop_changed(_expectations(told) if told else {}, cached and filecmp.cmp(new, path, shallow=False))
            if told is None:
                summary.unlink(missing_ok=True)
        with atomic_write(known, "w") as file:
            json.dump(versions, file)

    def _drop_changed(self, after: Mapping[str, Expected], same: bool) -> None:
        """Drop cached shards that the new index describes otherwise, or does not describe unless it is the `same`."""
        before = _expectations(self.index_folder / JSON)
        self._cache.drop([s for s in self._cache.shards() if before.get(s) != after.get(s) or not (same or s in after)])

    def _optional_version(self) -> dict[str, str] | None:
        """The version of `index.json`; {} where there is none or it may not be read."""
        try:
            return self._remote.version(JSON)
        except (FileNotFoundError, PermissionError):
            return {}

    def _copy_index(self, name: str, path: Path, version: Mapping[str, str] | None) -> None:
        size = (version or {}).get("size", "")
        self._remote.copy(name, path, Expected(int(size) if size.isdigit() else None).check)


def default_folder() -> Path:
    """`$MEDSAM2_CACHE`, else `~/.cache/medsam2/shards`."""
    own = os.environ.get("MEDSAM2_CACHE")
    return Path(own) if own else Path.home() / ".cache" / "medsam2" / "shards"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s: not readable (%s)", path, error)
        return None


def _expectations(path: Path) -> dict[str, Expected]:
    """Bytes and sha256 of each shard that an `index.json` tells; nothing of entries that are not as we write them."""
    content = _read_json(path)
    table = content.get("shards") if isinstance(content, dict) else None
    found = {}
    for shard, entry in table.items() if isinstance(table, dict) else ():
        size, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if isinstance(size, int) and size >= 0:
            found[str(shard)] = Expected(size, sha256 if isinstance(sha256, str) else None)
    return found
