"""Atomic writes (write beside the target, fsync, rename), locks and new folders."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import IO

from medsam2.errors import UserError


@contextmanager
def atomic_path(path: Path, ending: str = "") -> Iterator[Path]:
    """Yield a temporary name beside `path` with `ending`; on success fsync and rename it, on failure remove it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial{ending}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path | str, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path`, as `atomic_path`."""
    with atomic_path(Path(path)) as temporary, open(temporary, mode) as file:
        yield file


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_name(path: str) -> str:
    """Return the last part of a path; folder names may reveal users and must not be published."""
    return PureWindowsPath(path).name  # splits at / and at \


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that a rename in it survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def try_lock(path: Path) -> Iterator[bool | None]:
    """Try to lock a file or folder; the lock ends with the process and its forks.

    Yields:
        True with the lock; False if another process holds it or `path` is gone; None if the file system has no locks.
    """
    descriptor = -1
    locked: bool | None
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # NFS locks only writable files
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # the previous holder may have removed the file in between, and a lock on a removed file is useless
        locked = os.fstat(descriptor).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        locked = False
    except OSError:
        locked = None
    try:
        yield locked
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def new_folder(path: Path | str, force: bool = False) -> Path:
    """Create the folder `path` and return it; refuse a folder that is not empty, unless `force`.

    Raises:
        UserError: the folder is not empty, or is a file.
    """
    path = Path(path)
    if path.is_file():
        raise UserError(f"{path} is a file; name a folder that does not exist yet.")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise UserError(f"{path} already exists and is not empty; choose another folder or remove it first.")
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))
