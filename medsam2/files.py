"""Files that are either whole or absent: write beside the target, fsync, rename."""

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
    """A temporary name beside `path` with `ending`; on success the file is fsynced and renamed, on failure removed."""
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
    """The sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_name(path: str) -> str:
    """The last part of a path of any system: what may be passed on, since folders say who worked where."""
    return PureWindowsPath(path).name  # it reads both kinds of separators


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def try_lock(path: Path) -> Iterator[bool | None]:
    """Hold the lock of a file or folder; it falls with the process, and with its forks.

    Yields:
        False where another process holds it, or `path` is gone; None where it cannot be locked (some file systems).
    """
    descriptor = -1
    free: bool | None
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # NFS locks what can be written
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # whoever held it may have removed the file in between: a lock on that keeps nobody out
        free = os.fstat(descriptor).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        free = False
    except OSError:
        free = None
    try:
        yield free
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def new_folder(path: Path | str, force: bool = False) -> Path:
    """Create `path` and return it; refuse one that already holds something, unless `force`.

    Raises:
        UserError: the folder exists and is not empty, or is a file.
    """
    path = Path(path)
    if path.is_file():
        raise UserError(f"{path} is a file; give a folder that does not exist yet.")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise UserError(f"{path} already exists and is not empty; choose another folder or remove it first.")
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))
