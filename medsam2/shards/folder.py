"""Where a prepare writes: the target, the staging folder, the lock on both, and what stands in the target already."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsam2.errors import UserError
from medsam2.files import atomic_write, sync_folder
from medsam2.shards.index import ARROW, JSON, SegmentIndex
from medsam2.shards.target import ObjectTarget, Target, open_target

if TYPE_CHECKING:
    import pyarrow as pa

STAGING = ".staging"
STATE = "configuration.json"
FAILURES = "failures.jsonl"
DERIVED = "dataset_windows"
"""A key of the configuration in `index.json` that the data decided, not the command."""


@dataclass(frozen=True)
class PublishedCase:
    """One case of published shards, all ids salted."""

    dataset: str
    case: str
    patient: str
    split: str
    content_hash: str


@dataclass(frozen=True, eq=False)
class Published:
    """Shards that a reader sees. `index.arrow` is what holds: `index.json` may be newer by a kill between the two."""

    summary: dict[str, Any]
    table: pa.Table

    @cached_property
    def cases(self) -> dict[str, PublishedCase]:
        """By salted id; a case under several windows is several."""
        names = ("dataset", "case", "patient", "split", "content_hash")
        columns = (self.table.column(name).to_pylist() for name in names)
        return {row[1]: PublishedCase(*row) for row in zip(*columns, strict=True)}

    @cached_property
    def live(self) -> list[str]:
        """Names of the shards that readers use."""
        return sorted(self.table.column("shard").unique().to_pylist())

    @property
    def shards(self) -> dict[str, dict[str, Any]]:
        """Bytes and sha256 of the live shards."""
        return {name: self.summary["shards"][name] for name in self.live}

    @property
    def datasets(self) -> set[str]:
        """Data sets as the index names them, those without a case left too."""
        return {case.dataset for case in self.cases.values()} | set(self.summary.get("datasets", ()))

    @property
    def removed(self) -> set[str]:
        """Salted ids of patients who must not come back."""
        return set(self.summary.get("removed_patients", ()))

    @property
    def used_names(self) -> set[str]:
        """Names of shards that are taken, or were once and may live on in a cache."""
        return {*self.live, *self.summary.get("retired_shards", ())}

    def rows(self) -> list[dict[str, Any]]:
        """All rows of the index."""
        return list(self.table.to_pylist())


@dataclass(frozen=True)
class Output:
    """A target and the local folder in which its cases are staged."""

    target: Target
    staging: Path

    @property
    def failures(self) -> Path:
        """The list of failed cases, which has their names: it stays on this machine."""
        return (self.target.local or self.staging) / FAILURES

    @property
    def begun(self) -> bool:
        """Whether an earlier run left something to go on from."""
        return (self.staging / STATE).is_file()


def open_output(out: str | Path, staging: Path | None = None) -> Output:
    """The target `out` and its staging folder; nothing is created.

    Args:
        staging: a folder in which each target gets one of its own. By default `OUT/.staging`, or the user's cache
            folder for a URL.

    Raises:
        UserError: `out` is a file, or a URL that cannot be opened.
    """
    target = open_target(out)
    if target.local is not None and target.local.is_file():
        raise UserError(f"{target.where} is a file; give a folder that does not exist yet.")
    if staging is None and target.local is not None:
        return Output(target, target.local.absolute() / STAGING)
    where = target.where if target.local is None else str(target.local.resolve())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medsam2" / "staging"
    # a folder of its own in there, so that what the user has in it is never cleaned away
    folder = (cache if staging is None else staging.absolute()) / hashlib.sha256(where.encode()).hexdigest()[:16]
    if isinstance(target, ObjectTarget):
        target.scratch = folder
    return Output(target, folder)


def read_published(output: Output, configuration: dict[str, Any]) -> Published | None:
    """What stands in the target, or None where nothing is published yet.

    Raises:
        UserError: the target holds something else, or shards of another configuration.
    """
    target = output.target
    names = set(target.names())
    if {ARROW, JSON} <= names:
        found = _read_index(target)
        _refuse_other(target.where, found.summary["configuration"], configuration)
        return found
    if output.begun:
        if any(output.staging.glob("*.part")):
            _refuse_other(target.where, json.loads((output.staging / STATE).read_text()), configuration)
    elif names - {STAGING}:
        raise UserError(f"{target.where} already exists and is not empty; choose another folder or remove it first.")
    return None


def _read_index(target: Target) -> Published:
    table = read_table(target)
    try:
        found = Published(json.loads(target.read(JSON)), table)
        known, retired = set(found.summary["shards"]), set(found.summary.get("retired_shards", ()))
        dict(found.summary["configuration"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{target.where}/{JSON}: not readable ({error!r}); prepare into another folder.") from None
    unknown = set(found.live) - known
    if unknown & retired:
        raise UserError(f"{target.where}: taking out a patient was interrupted; run that command again first.")
    if unknown:
        raise UserError(f"{target.where}/{JSON}: does not list {min(unknown)}; make it again with --index-only.")
    return found


def read_table(target: Target) -> pa.Table:
    """The rows of the published `index.arrow`, memory-mapped."""
    if target.local is not None:
        return SegmentIndex(target.local).table
    with tempfile.TemporaryDirectory(prefix="medsam2-") as folder:
        target.copy_to(ARROW, Path(folder) / ARROW)
        return SegmentIndex(Path(folder)).table  # stays mapped without its name


def _refuse_other(where: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    given = json.loads(json.dumps(after))
    for key, old, new in _differences({k: v for k, v in before.items() if k != DERIVED}, given):
        raise UserError(
            f"{where} was prepared with {key}={old}, now it is {new}; choose another folder, or remove this one first."
        )


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(set(before) | set(after)):
        old, new = before.get(key), after.get(key)
        if all(value is None or isinstance(value, dict) for value in (old, new)):
            yield from _differences(old or {}, new or {}, f"{at}{key}.")
        elif old != new:
            yield f"{at}{key}", old, new


@contextmanager
def locked(output: Output) -> Iterator[None]:
    """Make the staging folder and keep every other prepare out; the lock falls with the process that holds it.

    Raises:
        UserError: another one is at work there.
    """
    with ExitStack() as stack:
        for place in _places(output):
            stack.enter_context(lock_folder(place, output.target.where))
        yield


def _places(output: Output) -> list[Path]:
    """The staging folder, and the one inside a local target where others look for a lock."""
    local = output.target.local
    return sorted({output.staging} if local is None else {output.staging, local.absolute() / STAGING})


@contextmanager
def lock_folder(folder: Path, where: str, other: str = "prepare") -> Iterator[None]:
    """Hold the lock in `folder`, which is made.

    Raises:
        UserError: another process holds it; `other` is what it may be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # whoever held it may have removed the file in between: a lock on that keeps nobody out
            ours = os.fstat(descriptor).st_ino == os.stat(folder / "lock").st_ino
        except (BlockingIOError, FileNotFoundError):
            ours = False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            ours = True  # a file system without locks, where the user has to take care
        if not ours:
            raise UserError(f"{where}: another {other} is writing there; wait for it to end.")
        yield
    finally:
        os.close(descriptor)


def begin(output: Output, configuration: dict[str, Any]) -> None:
    """Say in the staging folder what is being prepared, so that an equal command can go on."""
    with atomic_write(output.staging / STATE, "w") as file:
        json.dump(configuration, file)


def finish(output: Output) -> None:
    """Remove what was staged; of a URL the list of failed cases stays, since nothing local is beside the shards."""
    local = output.target.local
    if local is None and output.failures.is_file():
        for path in output.staging.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != output.failures:
                path.unlink()
        return
    for folder in _places(output):
        shutil.rmtree(folder, ignore_errors=not folder.is_dir())
    if local is not None:
        sync_folder(local)


@contextmanager
def told(where: str) -> Iterator[None]:
    """An error of the file system as one that says what is kept; nothing half-written is published."""
    try:
        yield
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        reason = f"{name}{error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "no space left while writing; free some"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            remedy = f"cannot be written ({reason}); mend that or choose another folder,"
        else:
            remedy = f"writing failed ({reason}); mend that"
        raise UserError(f"{where}: {remedy} and run the same command again: finished cases are kept.") from None
