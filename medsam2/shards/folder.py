"""The folder that shards are written to: who may write there, what it holds already, and where cases are staged."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from medsam2.errors import UserError
from medsam2.files import atomic_write, sync_folder
from medsam2.shards.index import ARROW, JSON, SegmentIndex
from medsam2.shards.target import Target

STAGING = ".staging"
STATE = "configuration.json"


@dataclass(frozen=True)
class Published:
    """An index that stands in the target already."""

    target: Target
    summary: dict[str, Any]

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Its rows, with the columns of `IndexRow`."""
        with tempfile.TemporaryDirectory(prefix="medsam2-") as folder:
            if self.target.local is None:
                self.target.copy_to(ARROW, Path(folder) / ARROW)
            return list(SegmentIndex(self.target.local or Path(folder)).table.to_pylist())

    @property
    def cases(self) -> Mapping[str, Mapping[str, str]]:
        """By salted id: dataset, split, patient, content hash."""
        found: Mapping[str, Mapping[str, str]] = self.summary["cases"]
        return found

    @property
    def removed(self) -> frozenset[str]:
        """Salted ids of the patients that were taken out, and stay out."""
        return frozenset(self.summary.get("removed_patients", ()))


def staging_folder(target: Target, given: Path | None) -> Path:
    """Where cases are staged: `given`, beside local shards, or for a URL in the user's cache."""
    if given is not None:
        return given
    if target.local is not None:
        return target.local / STAGING
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "medsam2" / "staging" / hashlib.sha256(target.where.encode()).hexdigest()[:16]


def read_published(target: Target) -> Published | None:
    """What is published there, or None.

    Raises:
        UserError: the index cannot be read.
    """
    if target.size(ARROW) is None or target.size(JSON) is None:
        return None
    try:
        return Published(target, json.loads(target.read(JSON)))
    except ValueError as error:
        raise UserError(
            f"{target.where}/{JSON}: not readable as json ({error}); prepare into another folder."
        ) from None


def check_folder(target: Target, staging: Path, published: Published | None, configuration: dict[str, Any]) -> None:
    """Refuse a folder of something else, or of another configuration.

    Raises:
        UserError: naming the key that differs, and both values.
    """
    folder = target.local
    if folder is not None and folder.is_file():
        raise UserError(f"{folder} is a file; give a folder that does not exist yet.")
    state = staging / STATE
    if published or (state.is_file() and any(staging.glob("*.part"))):
        before = published.summary["configuration"] if published else json.loads(state.read_text())
        after = json.loads(json.dumps(configuration))
        for key in sorted(set(before) | set(after)):
            if before.get(key) != after.get(key):
                raise UserError(
                    f"{target.where} was prepared with {key}={before.get(key)}, now it is {after.get(key)}; choose "
                    "another folder, or remove this one first."
                )
    elif not state.is_file() and any(name != STAGING for name in target.names()):
        raise UserError(f"{target.where} already exists and is not empty; choose another folder or remove it first.")


def begin(staging: Path, configuration: dict[str, Any]) -> None:
    """Make the staging folder and say in it what is being prepared."""
    try:
        staging.mkdir(parents=True, exist_ok=True)
        with atomic_write(staging / STATE, "w") as file:
            json.dump(configuration, file)
    except PermissionError as error:
        raise UserError(f"{error.filename or staging}: no permission to write there; choose another --out.") from None


@contextmanager
def space(where: str) -> Iterator[None]:
    """A full disk as an error that says what is kept; nothing half-written is published."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EROFS:
            raise UserError(f"{where}: the file system is read-only; choose another --out.") from None
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{where}: no space left while writing; free some and run the same command again: finished cases are kept."
        ) from None


@contextmanager
def lock(staging: Path, where: str) -> Iterator[None]:
    """One prepare at a time in a folder; the lock falls with the process that holds it."""
    descriptor = os.open(staging / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{where}: another prepare is writing there; wait for it to end.") from None
        yield
        sync_folder(staging.parent)
    finally:
        os.close(descriptor)


def write_failures(target: Target, entries: Sequence[dict[str, Any]]) -> None:
    """The failed cases by file, for this machine alone; an earlier list is replaced. A URL gets none: it is shared."""
    if target.local is None:
        return
    if not entries:
        target.delete("failures.jsonl")
        return
    with target.write("failures.jsonl") as file:
        file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode())
