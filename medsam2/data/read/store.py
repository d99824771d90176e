"""Where a folder of shards is: on this machine, or behind any fsspec URL (s3://, gs://, https://, memory:// ...).

The reader asks a store for ranges of bytes and does not know which kind it is. Nothing of a remote shard is kept: only
the ranges that a batch needs are fetched, each time.
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
"""File descriptors that a local store keeps open in each process."""
MAX_REQUESTS_AT_ONCE = 16
"""Ranges that a process requests together, and whose bytes it then holds: a batch of clips, as a rule."""
MAX_ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 0.5
"""Before the second attempt; each further pause is twice as long, and all are scattered by half of their length."""
CONNECT_SECONDS, SILENCE_SECONDS = 20.0, 60.0
"""How long an HTTP server may take to accept a connection, and to send something more."""
RETRYABLE_CLIENT_ERRORS = (408, 425, 429)
"""The HTTP statuses below 500 that another attempt may mend: time-out, too early, too many requests."""
ARROW_MAGIC = b"ARROW1"


class ByteRange(NamedTuple):
    """`length` bytes of a shard from byte `offset` on."""

    shard: str
    offset: int
    length: int


class LocalStore:
    """A folder of shards on this machine. Picklable.

    Attributes:
        shown: the folder in messages.
        index_folder: the folder that holds `index.arrow` (and `index.json` where there is one).
        max_gap: bytes between two members that are cheaper to read than to skip.
    """

    remote = False
    max_gap = 1 << 16

    def __init__(self, folder: Path | str) -> None:
        self.index_folder = Path(folder)
        self.shown = str(self.index_folder)
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def __reduce__(self) -> tuple[type[LocalStore], tuple[str]]:
        return LocalStore, (self.shown,)

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read_ranges(self, ranges: Sequence[ByteRange]) -> Iterator[memoryview]:
        """The bytes of each range, in this order, each valid until the next one is asked for.

        A range that reaches beyond the end of its shard gives fewer bytes.

        Raises:
            OSError: the shard does not exist, or cannot be read.
            UserError: the index gives a shard a name that is not the plain name of a tar.
        """
        buffer = memoryview(bytearray(max((wanted.length for wanted in ranges), default=0)))
        for shard, offset, length in ranges:
            descriptor, done = self._descriptor(shard), 0
            while done < length and (count := os.preadv(descriptor, [buffer[done:length]], offset + done)):
                done += count
            yield buffer[:done]

    def _descriptor(self, shard: str) -> int:
        """The open file of a shard; a forked process may use those of its parent, since no position is shared."""
        if shard not in self._descriptors:
            while len(self._descriptors) >= MAX_OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
            path = self.index_folder / require_plain_name(shard)
            self._descriptors[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors.move_to_end(shard)
        return self._descriptors[shard]


class RemoteStore:
    """A folder of shards behind a URL. Picklable, and usable after a fork.

    Each process that opens a URL fetches the index into a temporary folder ($TMPDIR) of its own, which goes when the
    store does; a pickled copy uses that of the original.

    Attributes:
        as those of `LocalStore`; `shown` is the URL without user, password and query.

    Raises:
        UserError: the protocol is not known, the folder cannot be reached or has no readable index, or the server does
            not send ranges of files.
    """

    remote = True
    max_gap = 1 << 20

    def __init__(self, url: str) -> None:
        self._url = url
        self.shown = mask_secrets(url).rstrip("/")
        self.index_folder = Path(tempfile.mkdtemp(prefix="medsam2-index-"))
        weakref.finalize(self, _remove_folder, self.index_folder, os.getpid())
        try:
            self._fetch_index()
        except FileNotFoundError:
            raise UserError(
                f"{self.shown}: holds no {INDEX_FILE}; make shards with `medsam2 prepare`, for tars that came from "
                "elsewhere with --index-only."
            ) from None
        except OSError as error:
            raise UserError(
                f"{self.shown}: the index cannot be fetched ({error}); check the address, the network, your "
                f"credentials and the space in {self.index_folder.parent}."
            ) from None

    def read_ranges(self, ranges: Sequence[ByteRange]) -> Iterator[memoryview]:
        """As `LocalStore.read_ranges`; some ranges at a time are requested together.

        Raises:
            FileNotFoundError: the other side was reached and has no such shard: it counts as damaged.
            UserError: it cannot be reached or refuses. This must not look like damage, since other samples would be
                drawn in place of those that are there.
        """
        for start in range(0, len(ranges), MAX_REQUESTS_AT_ONCE):
            group = ranges[start : start + MAX_REQUESTS_AT_ONCE]
            filesystem, _ = self._open()
            addresses = [self._address(require_plain_name(wanted.shard)) for wanted in group]
            ends = [wanted.offset + wanted.length for wanted in group]
            answers = filesystem.cat_ranges(addresses, [wanted.offset for wanted in group], ends, on_error="return")
            for wanted, answer in zip(group, answers, strict=True):
                yield memoryview(self._read_again(wanted) if isinstance(answer, BaseException) else answer)

    def read(self, shard: str, offset: int, length: int) -> bytes:
        """One range: what `SegmentIndex` takes for shards that do not lie beside their index."""
        return bytes(next(self.read_ranges([ByteRange(shard, offset, length)])))

    def _read_again(self, wanted: ByteRange) -> bytes:
        """A range whose first request failed, by itself and with pauses."""
        try:
            return self._cat(wanted.shard, wanted.offset, wanted.offset + wanted.length)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(f"{error}. The run can go on with resume=auto when that is mended.") from error

    def _fetch_index(self) -> None:
        """Bring the index and look at it; a login page or a server without ranges is recognised by the first bytes.

        Raises:
            OSError: it did not come. UserError: it came, and is not an index.
        """
        start = self._cat(INDEX_FILE, 0, len(ARROW_MAGIC))
        if len(start) > len(ARROW_MAGIC):
            raise UserError(
                f"{self.shown}: the server sends whole files where ranges are asked for; copy the shards to a disk, "
                "for example with rclone, and give data.shards the copy."
            )
        if start != ARROW_MAGIC:
            raise UserError(
                f"{self.shown}: what comes as {INDEX_FILE} is not an index of shards; check the address, and that it "
                "can be read without logging in."
            )
        self._download(INDEX_FILE)
        with suppress(FileNotFoundError, PermissionError):  # a bucket may refuse what it does not have
            self._download(SUMMARY_FILE)
        try:
            read_index(self.index_folder)
        except UserError as error:
            raise UserError(f"{self.shown}: {error}") from None

    def _download(self, name: str) -> None:
        path = str(self.index_folder / name)
        self._retry(name, lambda: self._open()[0].get_file(self._address(name), path))

    def _cat(self, name: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of a file; fewer where it ends before."""

        def request() -> bytes:
            try:
                return bytes(self._open()[0].cat_file(self._address(name), start=start, end=end))
            except Exception as error:  # every fsspec package has exceptions of its own, many of them no OSError
                if getattr(error, "status", None) == 416 or re.search("not satisfiable|InvalidRange", str(error)):
                    return b""  # the file ends before `start`
                raise

        return bytes(self._retry(name, request))

    def _retry(self, name: str, request: Callable[[], Any]) -> Any:
        """Make a request up to `MAX_ATTEMPTS` times.

        Raises:
            FileNotFoundError: there is no such file. PermissionError: access is denied. Both at once.
            OSError: everything else that the last attempt met.
        """
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return request()
            except Exception as error:  # see `_cat`
                status = getattr(error, "status", None)  # of an answer that aiohttp refused
                if isinstance(error, FileNotFoundError) or status in (404, 410):
                    raise FileNotFoundError(f"{self.shown}/{name}: no such file") from error
                reason = f"{self.shown}/{name}: {mask_secrets(f'{type(error).__name__}: {error}')}".rstrip(": ")
                if isinstance(error, PermissionError) or status in (401, 403):
                    raise PermissionError(reason) from error
                if isinstance(status, int) and 400 <= status < 500 and status not in RETRYABLE_CLIENT_ERRORS:
                    raise OSError(reason) from error
                if attempt == MAX_ATTEMPTS:
                    raise OSError(f"{reason} (after {attempt} attempts)") from error
                pause = FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1.5)
                log.info("%s; tried again in %.1f s", reason, pause)
                time.sleep(pause)
        raise AssertionError("a loop of at least one attempt returns or raises")

    def _open(self) -> tuple[Any, str]:
        """The file system and the path in it. fsspec keeps file systems, and makes new ones after a fork."""
        return open_url(self._url, **(_http_options() if self._url.startswith("http") else {}))

    def _address(self, name: str) -> str:
        root = self._open()[1]
        if not self._url.startswith("http"):
            return f"{root.rstrip('/')}/{name}"
        parts = urlsplit(root)  # the query, for example a signature, goes to each file
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


ShardStore = LocalStore | RemoteStore


def open_store(location: str | Path) -> ShardStore:
    """The shards of a local folder, a file:// URL, or any other fsspec URL.

    Raises:
        UserError: as `RemoteStore`.
    """
    path = str(location).removeprefix("file://")
    return RemoteStore(path) if "://" in path else LocalStore(path)


def store_index(store: ShardStore) -> SegmentIndex:
    """The index of a store, whose segments are read through it.

    Raises:
        UserError: no index, or not a readable one.
    """
    return read_index(store.index_folder, store.read if isinstance(store, RemoteStore) else None)


def _http_options() -> dict[str, Any]:
    """Time limits for aiohttp, whose own is five minutes for a whole answer; the user's fsspec configuration wins."""
    import fsspec
    from aiohttp import ClientTimeout

    timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS)
    return {"client_kwargs": {"timeout": timeout, **fsspec.config.conf.get("http", {}).get("client_kwargs", {})}}


def _remove_folder(folder: Path, owner: int) -> None:
    """Only the process that made it removes it: a forked worker has a copy of the store."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
