"""Folders of shards on this machine, or behind any fsspec URL (s3://, gs://, https://, memory:// ...).

The reader requests byte ranges and does not know which kind of store it uses. Remote shards are not cached: each batch
fetches the byte ranges that it needs.
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import tempfile
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

from medsam2.errors import UserError
from medsam2.shards.index import INDEX_FILE, SUMMARY_FILE, SegmentIndex, read_index, require_plain_name
from medsam2.shards.target import mask_secrets, open_url

log = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 32
"""Number of files that a local store keeps open per process."""
MAX_REQUESTS_AT_ONCE = 16
"""Number of byte ranges that a process requests together, and then holds in memory: usually a batch of clips."""
MAX_ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 0.5
"""Pause before the second attempt. Each further pause is twice as long; all vary randomly by half of their length."""
CONNECT_SECONDS, SILENCE_SECONDS = 20.0, 60.0
"""Time limits for an HTTP server to accept a connection, and between two pieces of its answer."""
RETRYABLE_CLIENT_ERRORS = (408, 425, 429)
"""HTTP statuses below 500 after which another attempt may succeed: time-out, too early, too many requests."""
ARROW_MAGIC = b"ARROW1"


class ByteRange(NamedTuple):
    """`length` bytes of a shard, starting at byte `offset`."""

    shard: str
    offset: int
    length: int


class LocalStore:
    """A folder of shards on this machine. Picklable.

    Attributes:
        path: the folder, for messages.
        index_folder: the folder with `index.arrow` (and `index.json`, if there is one).
        max_gap: largest gap in bytes between two members that it is faster to read than to skip.
    """

    remote = False
    max_gap = 1 << 16

    def __init__(self, folder: Path | str) -> None:
        self.index_folder = Path(folder)
        self.path = str(self.index_folder)
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def __reduce__(self) -> tuple[type[LocalStore], tuple[str]]:
        return LocalStore, (self.path,)

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read_ranges(self, ranges: Sequence[ByteRange]) -> Iterator[memoryview]:
        """Yield the bytes of each range in order. They are valid until the next range is read.

        A range that reaches beyond the end of its shard yields fewer bytes.

        Raises:
            OSError: the shard does not exist or cannot be read.
            UserError: the index contains a shard name that is not the plain name of a tar.
        """
        buffer = memoryview(bytearray(max((byte_range.length for byte_range in ranges), default=0)))
        for shard, offset, length in ranges:
            descriptor, filled = self._descriptor(shard), 0
            while filled < length and (count := os.preadv(descriptor, [buffer[filled:length]], offset + filled)):
                filled += count
            yield buffer[:filled]

    def _descriptor(self, shard: str) -> int:
        """Return the open file of a shard. Forked processes share it safely, since `preadv` has no file position."""
        if shard not in self._descriptors:
            while len(self._descriptors) >= MAX_OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
            path = self.index_folder / require_plain_name(shard)
            self._descriptors[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]


class RemoteStore:
    """A folder of shards behind a URL. Picklable, and usable after a fork.

    Creating a store fetches the index into a temporary folder ($TMPDIR), which is removed with the store; pickled
    copies use the folder of the original. The attributes are those of `LocalStore`; `path` is the URL without user,
    password and query.

    Raises:
        UserError: the protocol is unknown, the folder cannot be reached or has no readable index, or the server does
            not support byte ranges.
    """

    remote = True
    max_gap = 1 << 20

    def __init__(self, url: str) -> None:
        self._url = url
        self.path = mask_secrets(url).rstrip("/")
        self.index_folder = Path(tempfile.mkdtemp(prefix="medsam2-index-"))
        weakref.finalize(self, _remove_folder, self.index_folder, os.getpid())
        try:
            self._fetch_index()
        except FileNotFoundError:
            raise UserError(
                f"{self.path}: holds no {INDEX_FILE}; make shards with `medsam2 prepare`, for tars that came from "
                "elsewhere with --index-only."
            ) from None
        except OSError as error:
            raise UserError(
                f"{self.path}: the index cannot be fetched ({error}); check the address, the network, your "
                f"credentials and the space in {self.index_folder.parent}."
            ) from None

    def read_ranges(self, ranges: Sequence[ByteRange]) -> Iterator[memoryview]:
        """Yield the bytes of each range as `LocalStore.read_ranges`, requesting `MAX_REQUESTS_AT_ONCE` at a time.

        Raises:
            FileNotFoundError: the server has no such shard; its segments count as damaged.
            UserError: the server cannot be reached or denies access. These segments must not count as damaged, or
                other clips would replace them.
        """
        for start in range(0, len(ranges), MAX_REQUESTS_AT_ONCE):
            group = ranges[start : start + MAX_REQUESTS_AT_ONCE]
            filesystem, _ = self._open()
            addresses = [self._address(require_plain_name(part.shard)) for part in group]
            starts, ends = [part.offset for part in group], [part.offset + part.length for part in group]
            answers = filesystem.cat_ranges(addresses, starts, ends, on_error="return")
            for part, answer in zip(group, answers, strict=True):
                yield memoryview(self._retry_range(part) if isinstance(answer, BaseException) else answer)

    def read(self, shard: str, offset: int, length: int) -> bytes:
        """Return one byte range, for `SegmentIndex`."""
        return bytes(next(self.read_ranges([ByteRange(shard, offset, length)])))

    def _retry_range(self, part: ByteRange) -> bytes:
        """Request a single range again, with pauses, after its first request failed."""
        try:
            return self._cat(part.shard, part.offset, part.offset + part.length)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(f"{error}. Continue the run with resume=auto once the shards can be read.") from error

    def _fetch_index(self) -> None:
        """Download the index and check it. The first bytes tell a login page, or a server without byte ranges.

        Raises:
            OSError: the download failed. UserError: the file is not an index.
        """
        start = self._cat(INDEX_FILE, 0, len(ARROW_MAGIC))
        if len(start) > len(ARROW_MAGIC):
            raise UserError(
                f"{self.path}: the server does not support byte ranges and sends whole files. Copy the shards to a "
                "disk, for example with rclone, and set data.shards to the copy."
            )
        if start != ARROW_MAGIC:
            raise UserError(
                f"{self.path}: the {INDEX_FILE} that the server sends is not an index of shards. Check the address, "
                "and that it can be read without logging in."
            )
        self._download(INDEX_FILE)
        with suppress(FileNotFoundError, PermissionError):  # Some buckets deny access to files that do not exist.
            self._download(SUMMARY_FILE)
        try:
            read_index(self.index_folder)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None

    def _download(self, name: str) -> None:
        path = str(self.index_folder / name)
        self._retry(name, lambda: self._open()[0].get_file(self._address(name), path))

    def _cat(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end` of a file; fewer if it ends before."""

        def request() -> bytes:
            try:
                return bytes(self._open()[0].cat_file(self._address(name), start=start, end=end))
            except Exception as error:  # Each fsspec package raises its own exceptions, many of them no OSError.
                if getattr(error, "status", None) == 416 or re.search("not satisfiable|InvalidRange", str(error)):
                    return b""  # The file ends before `start`.
                raise

        return bytes(self._retry(name, request))

    def _retry(self, name: str, request: Callable[[], Any]) -> Any:
        """Make a request up to `MAX_ATTEMPTS` times.

        Raises:
            FileNotFoundError: there is no such file; not retried.
            PermissionError: access is denied; not retried.
            OSError: another client error (not retried), or the error of the last attempt.
        """
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return request()
            except Exception as error:  # See `_cat`.
                status = getattr(error, "status", None)  # HTTP status of aiohttp's exceptions.
                if isinstance(error, FileNotFoundError) or status in (404, 410):
                    raise FileNotFoundError(f"{self.path}/{name}: no such file") from error
                reason = f"{self.path}/{name}: {mask_secrets(f'{type(error).__name__}: {error}')}".rstrip(": ")
                if isinstance(error, PermissionError) or status in (401, 403):
                    raise PermissionError(reason) from error
                if isinstance(status, int) and 400 <= status < 500 and status not in RETRYABLE_CLIENT_ERRORS:
                    raise OSError(reason) from error
                if attempt == MAX_ATTEMPTS:
                    raise OSError(f"{reason} (after {attempt} attempts)") from error
                pause = FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1.5)
                log.info("%s; trying again in %.1f s", reason, pause)
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _open(self) -> tuple[Any, str]:
        """Return the file system and the path in it. fsspec caches file systems, and makes new ones after a fork."""
        return open_url(self._url, **(_http_options() if self._url.startswith("http") else {}))

    def _address(self, name: str) -> str:
        root = self._open()[1]
        if not self._url.startswith("http"):
            return f"{root.rstrip('/')}/{name}"
        parts = urlsplit(root)  # The query, for example a signature, applies to each file.
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


ShardStore = LocalStore | RemoteStore


def open_store(location: str | Path) -> ShardStore:
    """Open the shards of a local folder, a file:// URL or any other fsspec URL.

    Raises:
        UserError: as `RemoteStore`.
    """
    path = str(location).removeprefix("file://")
    return RemoteStore(path) if "://" in path else LocalStore(path)


def store_index(store: ShardStore) -> SegmentIndex:
    """Read the index of a store. Its segments are read from the store.

    Raises:
        UserError: there is no index, or it cannot be read.
    """
    return read_index(store.index_folder, store.read if isinstance(store, RemoteStore) else None)


def _http_options() -> dict[str, Any]:
    """Return time limits for aiohttp, whose default of 5 min is for a whole answer; fsspec's configuration wins."""
    import fsspec
    from aiohttp import ClientTimeout

    timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
    return {"client_kwargs": {"timeout": timeout, **fsspec.config.conf.get("http", {}).get("client_kwargs", {})}}


def _remove_folder(folder: Path, owner: int) -> None:
    """Remove a folder in the process that created it; forked workers have copies of the store."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
