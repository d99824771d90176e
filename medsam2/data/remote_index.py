"""The index of a folder behind a URL, in the cache folder: what a run knows of shards that lie elsewhere."""

from __future__ import annotations

import filecmp
import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from medsam2.data.cache import Expected, ShardCache, locked
from medsam2.data.cache_settings import CacheSettings, default_folder
from medsam2.data.remote import Remote
from medsam2.errors import UserError
from medsam2.files import atomic_path, atomic_write
from medsam2.shards.index import ARROW, JSON

log = logging.getLogger(__name__)
VERSION = "index.version"


class RemoteIndex:
    """Brings the cached index of a URL up to date when it is made. Picklable.

    Attributes:
        cache: the place of the URL in the cache folder, where the index lies and whole shards may.
        expected: bytes and sha256 of the shards that `index.json` describes.

    Raises:
        UserError: there is no index, or it cannot be reached while the cache holds none; or there can be no cache.
    """

    def __init__(self, remote: Remote, settings: CacheSettings) -> None:
        self._remote = remote
        folder = settings.folder or default_folder()
        try:
            self.cache = ShardCache(folder.expanduser().absolute(), remote.shown, int(settings.size_gb * 1e9))
        except OSError as error:
            raise UserError(f"{folder}: cannot hold the cache of shards ({error}); give data.cache.folder.") from None
        self.folder = self.cache.place
        self.expected = self._fetch()

    def _fetch(self) -> dict[str, Expected]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "index.lock"):
            try:
                self._refresh()
            except FileNotFoundError:
                raise UserError(
                    f"{self._remote.shown}: holds no {ARROW}; make shards with `medsam2 prepare`, for tars that came "
                    "from elsewhere with --index-only."
                ) from None
            except OSError as error:
                if not (self.folder / ARROW).is_file():
                    raise UserError(
                        f"{self._remote.shown}: the index cannot be fetched ({error}), and none is in the cache "
                        f"{self.folder}; check the address, the network and your credentials."
                    ) from None
                log.warning("the index cannot be fetched (%s); the one in %s is used", error, self.folder)
            return _expectations(self.folder / JSON)

    def _refresh(self) -> None:
        """Fetch the index unless the cached one is that of the other side; drop shards that changed with it."""
        versions = {JSON: self._optional_version(), ARROW: self._remote.version(ARROW)}
        known = self.folder / VERSION
        cached = (self.folder / ARROW).is_file()
        if cached and versions[ARROW] is not None and _read_json(known) == versions:
            return
        known.unlink(missing_ok=True)  # whatever happens from here on, the next one looks again
        for left in self.folder.glob(".index.*.partial"):  # of a process that was killed
            left.unlink()
        path, summary = self.folder / ARROW, self.folder / JSON
        with ExitStack() as both:
            new = both.enter_context(atomic_path(path))
            self._copy(ARROW, new, versions[ARROW])
            told = None
            if versions[JSON] != {}:
                told = both.enter_context(atomic_path(summary))
                self._copy(JSON, told, versions[JSON])
            # before the new index is there: a kill in between must not leave old shards with it
            self._drop_changed(_expectations(told) if told else {}, cached and filecmp.cmp(new, path, shallow=False))
            if told is None:
                summary.unlink(missing_ok=True)
        with atomic_write(known, "w") as file:
            json.dump(versions, file)

    def _drop_changed(self, after: Mapping[str, Expected], same: bool) -> None:
        """Drop cached shards that the new index describes otherwise, or does not describe unless it is the `same`."""
        before = _expectations(self.folder / JSON)
        self.cache.drop([s for s in self.cache.shards() if before.get(s) != after.get(s) or not (same or s in after)])

    def _optional_version(self) -> dict[str, str] | None:
        """The version of `index.json`; {} where there is none or it may not be read."""
        try:
            return self._remote.version(JSON)
        except (FileNotFoundError, PermissionError):
            return {}

    def _copy(self, name: str, path: Path, version: Mapping[str, str] | None) -> None:
        size = (version or {}).get("size", "")
        self._remote.copy(name, path, Expected(int(size) if size.isdigit() else None).check)


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
