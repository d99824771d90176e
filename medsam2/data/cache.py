"""A folder of fetched shards with a size limit, shared by the threads, processes and runs of one machine.

Each URL has a sub-folder `url-HASH` with its index, its shards and an empty lock file a shard. Locks are `flock`s: one
vanishes with the process that held it, and threads of one process exclude each other too. A shard on its way is
called `SHARD.BYTES.part`: the bytes that it will take count against the limit from the start.

A shard that was fetched ahead has its time of change `AHEAD` seconds in the future until it is used. So the order by
that time, which is seen by all processes, is the order in which shards may go.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from medsam2.errors import UserError

log = logging.getLogger(__name__)

AHEAD = 3600.0
"""Seconds for which a shard that was fetched ahead is kept for its use, as long as anything else can go."""
GRACE = 0.2
"""Seconds in which the reader opens a shard whose path it was given; it is not evicted before."""
_PLACE = re.compile(r"url-[0-9a-f]{16}")  # nothing else in the folder is ever deleted
_PART = re.compile(r"(?P<shard>.+)\.(?P<bytes>\d+)\.part")
Get = Callable[[Path], None]
"""Writes a file, or raises."""
FULL = (errno.ENOSPC, errno.EDQUOT)
_held: set[int] = set()


def _let_go() -> None:
    """A forked child has copies of its parent's locks, which would outlive the parent."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path`, made where there is none; gives False if it is taken and `wait` is off."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def plain_name(shard: str) -> str:
    """`shard` itself, if it is the plain name of a tar: names come from an index that somebody else may have made.

    Raises:
        UserError: it leads to another folder, is hidden, or is no tar.
    """
    if not shard.endswith(".tar") or shard.startswith(".") or not shard.isprintable() or set(shard) & set("/\\"):
        raise UserError(
            f"the index names {shard!r} as a shard, which is not the plain name of a .tar file; do not use it."
        )
    return shard


class WrongContent(OSError):
    """What the other side sends is not the shard that the index describes."""


@dataclass(frozen=True)
class Expected:
    """What a shard has to be: bytes and sha256; None where nobody said."""

    size: int | None = None
    sha256: str | None = None

    def check(self, path: Path) -> None:
        """Raises WrongContent if the file is anything else."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            raise WrongContent(f"{size} bytes came instead of {self.size}")
        if self.sha256 is not None:
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.sha256:
                raise WrongContent(f"sha256 {found[:12]}... instead of {self.sha256[:12]}... of index.json")


class ShardCache:
    """The shards of one URL in a cache folder, and the limit over all URLs of the folder.

    Args:
        folder: the cache folder; made where there is none.
        url: decides the sub-folder.
        limit: bytes that all shards of the folder may take.
    """

    def __init__(self, folder: Path, url: str, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self.place = folder / f"url-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
        self.place.mkdir(parents=True, exist_ok=True)
        self._told = False

    def find(self, shard: str, expected: Expected, ahead: bool = False) -> Path | None:
        """The shard if it is there whole; its use, or with `ahead` its coming use, is noted."""
        path = self.place / plain_name(shard)
        try:
            size = path.stat().st_size
            if expected.size is not None and size != expected.size:
                log.warning("%s: %d bytes instead of %d; it is fetched again", path, size, expected.size)
                path.unlink()
                return None
            now = time.time()
            os.utime(path, (now, now + AHEAD if ahead else now))
        except FileNotFoundError:
            return None
        return path

    def fetch(self, shard: str, expected: Expected, get: Get) -> Path:
        """The shard, through `get` unless somebody was faster; whole or absent.

        Raises:
            OSError: of `get`; or the disk is full.
        """
        with self._locked(shard, wait=True):
            found = self.find(shard, expected)
            if found is None:
                self._fetch(shard, expected, get, ahead=False)
            return self.place / shard

    def fetch_ahead(self, shard: str, expected: Expected, get: Get) -> bool:
        """As `fetch`, before the shard is needed; False: only what was fetched ahead too could make room for it.

        What somebody else is fetching is left to them.
        """
        with self._locked(shard, wait=False) as mine:
            return not mine or self.find(shard, expected, True) is not None or self._fetch(shard, expected, get, True)

    def _locked(self, shard: str, wait: bool) -> AbstractContextManager[bool]:
        self.place.mkdir(parents=True, exist_ok=True)  # somebody may have cleared the cache
        return locked(self.place / f"{plain_name(shard)}.lock", wait)

    def _fetch(self, shard: str, expected: Expected, get: Get, ahead: bool) -> bool:
        part = self.place / f"{shard}.{expected.size or 0}.part"
        try:
            if not self._reserve(part, expected.size or 0, ahead):
                return False
            get(part)
            if expected.size is None and not self._reserve(part, part.stat().st_size, ahead):
                return False
            self._publish(part, self.place / shard, ahead)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise OSError(
                error.errno,
                f"no space left for {shard} in the cache; lower data.cache.size_gb (now {self.limit / 1e9:g}) or "
                "give data.cache.folder on a larger disk",
                str(self.place),
            ) from error
        finally:
            part.unlink(missing_ok=True)
        return True

    def drop(self, shards: list[str]) -> None:
        """Forget shards whose content has changed at its origin."""
        for shard in shards:
            (self.place / plain_name(shard)).unlink(missing_ok=True)

    def shards(self) -> list[str]:
        """The shards of this URL that are there."""
        return sorted(path.name for path in self.place.glob("*.tar"))

    def _publish(self, part: Path, path: Path, ahead: bool) -> None:
        """Rename, with the bytes on the disk first: a power cut must not leave a hole in a file of the right size."""
        descriptor = os.open(part, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        now = time.time()
        os.utime(part, (now, now + AHEAD if ahead else now))
        os.replace(part, path)

    def _reserve(self, part: Path, size: int, ahead: bool) -> bool:
        """Make room for `size` bytes and note them as taken by making `part`; False: `ahead`, and no room."""
        for last in (ahead, True):
            with locked(self.folder / "room.lock"):
                evict, excess, at_once = self._choose(part, size, ahead)
                if excess > 0 and ahead:
                    return False
                if at_once or last:
                    for path in evict:
                        path.unlink(missing_ok=True)
                    if excess > 0:
                        self._tell_too_small(part, size)
                    part.touch()
                    return True
            time.sleep(GRACE)
        raise AssertionError("the second round makes room at once")

    def _choose(self, part: Path, size: int, ahead: bool) -> tuple[list[Path], int, bool]:
        """What to evict for `size` more bytes, the bytes in excess after that, and whether it is not just in use."""
        whole, used = self._contents(part)
        excess = used + size - self.limit
        now = time.time()
        evict: list[Path] = []
        at_once = True
        # what was fetched ahead goes last, and of it first what will be needed last
        for changed, length, path in sorted(whole, key=lambda one: (one[0] > now, abs(one[0] - now) * -1)):
            if excess <= 0 or (ahead and changed > now - GRACE):
                break
            at_once &= not now - GRACE < changed <= now
            evict.append(path)
            excess -= length
        return evict, excess, at_once

    def _contents(self, mine: Path) -> tuple[list[tuple[float, int, Path]], int]:
        """(time, bytes, path) of every shard of the folder, and the bytes of all, with those on their way but `mine`.

        What is left of a fetch that was killed is deleted: nobody holds its lock.
        """
        whole: list[tuple[float, int, Path]] = []
        used = 0
        for place in self.folder.iterdir():
            if not _PLACE.fullmatch(place.name):
                continue
            for entry in os.scandir(place):
                path = Path(entry.path)
                with suppress(FileNotFoundError):
                    if entry.name.endswith(".tar"):
                        status = entry.stat()
                        whole.append((status.st_mtime, status.st_size, path))
                        used += status.st_size
                    elif (part := _PART.fullmatch(entry.name)) and path != mine and not _removed(path, part, mine):
                        used += max(int(part["bytes"]), entry.stat().st_size)
        return whole, used

    def _tell_too_small(self, part: Path, size: int) -> None:
        if self._told:
            return
        self._told = True
        log.warning(
            "%s: data.cache.size_gb=%g has no room for %s of %g GB beside what is being fetched; it is exceeded, and "
            "shards may be fetched again and again",
            self.folder, self.limit / 1e9, part.name, size / 1e9,
        )  # fmt: skip


def _removed(path: Path, part: re.Match[str], mine: Path) -> bool:
    """Delete a part if its fetch is no more; `mine` is what this thread itself fetches, under its own lock."""
    if path.parent == mine.parent and (own := _PART.fullmatch(mine.name)) and own["shard"] == part["shard"]:
        path.unlink(missing_ok=True)
        return True
    with locked(path.parent / f"{part['shard']}.lock", wait=False) as free:
        if free:
            path.unlink(missing_ok=True)
        return free
