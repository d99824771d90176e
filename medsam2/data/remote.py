"""Files behind an fsspec URL: what they are, and copies of them, tried again where that may help.

File systems are opened anew in each process: those that talk over a network do not survive a fork.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from medsam2.data.cache import FULL, WrongContent
from medsam2.errors import UserError
from medsam2.shards.target import open_url

log = logging.getLogger(__name__)
T = TypeVar("T")

PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the second attempt, doubled for each further one; and the most."""
CONNECT, SILENCE = 20.0, 60.0
"""Seconds until an HTTP server has to accept, and to send something more."""
_VERSION = frozenset(
    ("created", "mtime", "modified", "modify", "modificationtime", "lastmodified", "updated", "etag", "md5hash",
     "contentmd5", "digest", "generation", "versionid", "sha", "blobid")
)  # fmt: skip


class Remote:
    """The files of one folder behind a URL. Picklable, and usable after a fork.

    Args:
        url: any fsspec URL. A query (`https://host/shards?signature=...`) goes to each file and into no message.
        attempts: how often a request is tried.

    Raises:
        UserError: the protocol is not known, or its package is not installed.
    """

    def __init__(self, url: str, attempts: int) -> None:
        self._url = url
        self.attempts = attempts
        self._opened: tuple[int, Any, str] | None = None
        self._http = url.startswith(("http://", "https://"))
        self.shown = _without_secrets(url).rstrip("/")
        self._filesystem()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def version(self, name: str) -> dict[str, str] | None:
        """What changes when the file does: size, time, etag; None if the other side tells no more than a size."""
        information = self._info(name)
        found = {key: str(value) for key, value in information.items() if _plain(key) in _VERSION and value}
        return {**found, "size": str(information.get("size"))} if found else None

    def size(self, name: str) -> int | None:
        """Bytes, where the other side tells them."""
        size = self._info(name).get("size")
        return None if size is None else int(size)

    def copy(self, name: str, path: Path, check: Callable[[Path], None], attempts: int | None = None) -> None:
        """Fetch a whole file to `path`; what `check` refuses (OSError) is fetched again.

        Raises:
            FileNotFoundError: there is none; at once.
            OSError: it did not come, or came wrong, in `attempts` attempts; or `path` cannot be written.
        """

        def get() -> None:
            filesystem, _ = self._filesystem()
            filesystem.get_file(self._address(name), str(path))
            check(path)

        self._tried(name, get, attempts)

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of a file; fewer where it ends before. What else a server may send is not checked.

        Raises:
            FileNotFoundError: there is none; at once.
            OSError: they did not come in all attempts.
        """

        def get() -> bytes:
            filesystem, _ = self._filesystem()
            try:
                return bytes(filesystem.cat_file(self._address(name), start=start, end=end))
            except Exception as error:
                if _is_beyond(error):
                    return b""
                raise

        return self._tried(name, get)

    def ask(self, name: str, start: int, end: int) -> Future[bytes] | None:
        """One attempt of `read` that is not waited for; None: the protocol's package knows no such thing."""
        from fsspec.asyn import AsyncFileSystem

        filesystem, _ = self._filesystem()
        if not isinstance(filesystem, AsyncFileSystem):
            return None
        request = filesystem._cat_file(self._address(name), start=start, end=end)
        return asyncio.run_coroutine_threadsafe(request, filesystem.loop)

    def _info(self, name: str) -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            filesystem, _ = self._filesystem()
            filesystem.invalidate_cache()
            return dict(filesystem.info(self._address(name)))

        return self._tried(name, ask)

    def _filesystem(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), *open_url(self._url, **(_http_options() if self._http else {})))
        return self._opened[1:]

    def _address(self, name: str) -> str:
        root = self._filesystem()[1]
        if not self._http:
            return f"{root.rstrip('/')}/{name}"
        parts = urlsplit(root)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))

    def _tried(self, name: str, action: Callable[[], T], attempts: int | None = None) -> T:
        attempts = attempts or self.attempts
        for attempt in range(1, attempts + 1):
            try:
                return action()
            except Exception as error:  # every fsspec package has exceptions of its own, many of them no OSError
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                if attempt == attempts or _is_final(error):
                    raise self._explained(name, error, attempt) from error
                pause = min(PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE) * random.SystemRandom().uniform(0.5, 1.5)
                log.info("%s/%s: %s; tried again in %.1f s", self.shown, name, self._reason(error), pause)
                time.sleep(pause)
        raise AssertionError("a loop of at least one attempt returns or raises")

    def _explained(self, name: str, error: Exception, attempt: int) -> OSError:
        if is_missing(error):
            return FileNotFoundError(f"{self.shown}/{name}: no such file")
        kind: type[OSError] = WrongContent if isinstance(error, WrongContent) else OSError
        if isinstance(error, PermissionError) or _status(error) in (401, 403):
            kind = PermissionError
        times = "" if attempt == 1 else f" (after {attempt} attempts)"
        return kind(f"{self.shown}/{name}: {self._reason(error)}{times}")

    def _reason(self, error: BaseException) -> str:
        if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
            error = error.__cause__  # fsspec says "not found" of a web server that cannot be reached
        text = f"{type(error).__name__}: {error}".rstrip(": ")
        return text.replace(self._url, self.shown).replace(urlsplit(self._url).query or "\0", "...")


@contextmanager
def unreachable_stops() -> Iterator[None]:
    """Around what is fetched for a sample: that the other side cannot be reached must not look like damage.

    Else other samples would be drawn in its place. What is missing there, or not what the index describes, is damage.

    Raises:
        UserError: for every other OSError.
    """
    try:
        yield
    except (FileNotFoundError, WrongContent):
        raise
    except OSError as error:
        raise UserError(f"{error}. The run can go on with resume=auto when that is mended.") from error


def is_missing(error: BaseException) -> bool:
    """Whether the other side was reached and has no such file."""
    if not isinstance(error, FileNotFoundError):
        return False
    cause = error.__cause__
    if cause is None:
        return True
    if (status := _status(cause)) is not None:
        return status in (404, 410)
    return not isinstance(cause, OSError) and not type(cause).__module__.startswith("aiohttp")


def _is_final(error: BaseException) -> bool:
    """Whether another attempt would end in the same way."""
    if is_missing(error) or isinstance(error, PermissionError):
        return True
    status = _status(error)
    return status is not None and 400 <= status < 500 and status not in (408, 425, 429)


def _is_beyond(error: BaseException) -> bool:
    """Whether a range was asked for that begins where the file has ended."""
    return _status(error) == 416 or any(said in str(error) for said in ("not satisfiable", "InvalidRange"))


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error."""
    for one in (error, error.__cause__):
        status = getattr(one, "status", None)
        if isinstance(status, int):
            return status
    return None


def _plain(key: str) -> str:
    return key.lower().replace("-", "").replace("_", "")


def _http_options() -> dict[str, Any]:
    """Time limits for aiohttp, whose own, five minutes for a whole answer, is short for a large shard on a slow line.

    What the user's fsspec configuration says goes first.
    """
    import fsspec

    try:
        from aiohttp import ClientTimeout
    except ImportError:  # fsspec says itself what is missing
        return {}
    own = fsspec.config.conf.get("http", {}).get("client_kwargs", {})
    return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENCE), **own}}


def _without_secrets(url: str) -> str:
    """The URL without user, password and query."""
    if "://" not in url or "::" in url:
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1], query="", fragment=""))
