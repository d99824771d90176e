"""Where a prepare writes: the folder of the shards, the staging folder, the lock, and what is published already.

`sources.json` beside the shards holds the state of the sources of every case under its salted id, so that a prepare
that is run again tells what has changed since: cheaply by sizes and times, surely by content.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsam2.errors import UserError
from medsam2.files import atomic_write, file_sha256, sync_folder, try_lock
from medsam2.shards.index import ARROW, JSON
from medsam2.shards.target import UrlFolder, mask_secrets, open_folder

if TYPE_CHECKING:
    from medsam2.shards.prepare.stage import Job

STAGING = ".staging"
SOURCES = "sources.json"
CONFIGURATION = "configuration.json"
FAILURES = "failures.jsonl"
DERIVED = "dataset_windows"
"""A key of the configuration in `index.json` that the data decided, not the command."""


@dataclass(frozen=True)
class Output:
    """Where a prepare writes.

    Attributes:
        where: the folder or URL, for messages.
        folder: the local folder in which shards and index are made. url: where they are sent at the end.
        staging: the local folder in which cases are staged.
        failures: the list of failed cases, which has their names: it stays on this machine.
    """

    where: str
    folder: Path
    staging: Path
    failures: Path
    url: UrlFolder | None = None

    @property
    def begun(self) -> bool:
        """Whether an earlier run left something to go on from."""
        return (self.staging / CONFIGURATION).is_file()

    def names(self) -> set[str]:
        """Files and folders in the place that readers see."""
        if self.url:
            return set(self.url.sizes())
        return {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()

    def read(self, name: str) -> bytes:
        """A file of the place that readers see."""
        return self.url.read(name) if self.url else (self.folder / name).read_bytes()


@dataclass(frozen=True)
class SourceState:
    """What the sources of a case were like.

    Attributes:
        patient: the salted id. stamp: a hash of sizes, modification times and of what the data set says of the case.
        content: the same with the files' bytes in place of sizes and times; empty where they could not be read.
    """

    patient: str
    stamp: str
    content: str = ""


@dataclass(frozen=True)
class Published:
    """Shards that a reader sees: `index.json`, and the states of their sources by salted case id.

    `sources` is None of shards that were prepared before states were kept.
    """

    summary: dict[str, Any]
    sources: dict[str, SourceState] | None


def open_output(out: str | Path, staging: Path | None = None) -> Output:
    """The place `out` and its staging folder; nothing is created.

    Args:
        staging: a folder in which each output gets one of its own. By default `OUT/.staging`, or the user's cache
            folder for a URL.

    Raises:
        UserError: `out` is a file, or a URL that cannot be opened.
    """
    place = open_folder(out)
    if isinstance(place, Path) and place.is_file():
        raise UserError(f"{place} is a file; give a folder that does not exist yet.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medsam2" / "staging"
    name = hashlib.sha256(str(out if isinstance(place, UrlFolder) else place.resolve()).encode()).hexdigest()[:16]
    # a folder of its own in there, so that what the user has in it is never cleaned away
    of_out = (cache if staging is None else staging.absolute()) / name
    if isinstance(place, UrlFolder):
        return Output(mask_secrets(str(out)), of_out / "shards", of_out, of_out.with_name(f"{name}-{FAILURES}"), place)
    return Output(str(place), place, place.absolute() / STAGING if staging is None else of_out, place / FAILURES)


def read_published(output: Output, configuration: dict[str, Any]) -> Published | None:
    """The shards that are there, or None where nothing is published yet.

    Raises:
        UserError: the place holds something else, or shards of another configuration.
    """
    names = output.names()
    if {ARROW, JSON} <= names:
        try:
            summary = dict(json.loads(output.read(JSON)))
            stated = json.loads(output.read(SOURCES)) if SOURCES in names else None
            sources = None if stated is None else {case: SourceState(**state) for case, state in stated.items()}
            before = dict(summary["configuration"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{output.where}: {JSON} or {SOURCES} is damaged ({error!r}); choose another --out."
            ) from None
        _refuse_other(output.where, before, configuration)
        return Published(summary, sources)
    if output.begun:
        if any(output.staging.glob("*.part")):
            _refuse_other(output.where, json.loads((output.staging / CONFIGURATION).read_text()), configuration)
    elif names - {STAGING}:
        raise UserError(f"{output.where} already exists and is not empty; choose another folder or remove it first.")
    return None


def _refuse_other(where: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    old, new = (dict(_flatten(settings)) for settings in (before, json.loads(json.dumps(after))))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(DERIVED):
            raise UserError(
                f"{where} was prepared with {key}={old.get(key)}, now it is {new.get(key)}; choose another folder, or "
                "remove this one first."
            )


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings by dotted names."""
    for name, value in settings.items():
        yield from _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]


@contextmanager
def locked(output: Output) -> Iterator[None]:
    """Make the folders and keep every other prepare out; the lock falls with the process that holds it.

    Raises:
        UserError: another one is at work there.
    """
    output.staging.mkdir(parents=True, exist_ok=True)
    with lock_folder(output.staging if output.url else output.folder / STAGING, output.where):
        output.folder.mkdir(parents=True, exist_ok=True)
        yield


@contextmanager
def lock_folder(folder: Path, where: str, other: str = "prepare") -> Iterator[None]:
    """Hold the lock in `folder`, which is made.

    Raises:
        UserError: another process holds it; `other` is what it may be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lock").touch()
    with try_lock(folder / "lock") as free:
        if free is False:
            raise UserError(f"{where}: another {other} is writing there; wait for it to end.")
        yield  # on a file system without locks the user has to take care


def begin(output: Output, configuration: dict[str, Any]) -> None:
    """State in the staging folder what is being prepared, so that an equal command can go on."""
    with atomic_write(output.staging / CONFIGURATION, "w") as file:
        json.dump(configuration, file)


def finish(output: Output) -> None:
    """Remove what was staged."""
    shutil.rmtree(output.staging)
    if not output.url:
        shutil.rmtree(output.folder / STAGING, ignore_errors=True)
        sync_folder(output.folder)


@contextmanager
def explain_os_errors(where: str) -> Iterator[None]:
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


# ------------------------------------------------------------------------------------------- states of the sources


def find_changes(jobs: Sequence[Job], before: Mapping[str, SourceState]) -> dict[str, list[str]]:
    """What differs from the states `before` (by salted case id): cases that were added, changed, or are gone.

    Returns:
        The names of the cases (dataset/case) by "added" and "changed", the salted ids of those that are "gone"; a kind
        of change without a case has no entry.
    """
    changes: dict[str, list[str]] = {"added": [], "changed": [], "gone": [*before.keys() - {job.case for job in jobs}]}
    for job in jobs:
        state = before.get(job.case)
        if state is None:
            changes["added"].append(job.name)
        elif state.stamp != source_stamp(job) and state.content != source_content(job):
            changes["changed"].append(job.name)
    return {kind: cases for kind, cases in changes.items() if cases}


def source_state(job: Job) -> SourceState:
    """The state of a case's sources now."""
    return SourceState(job.patient, source_stamp(job), source_content(job))


def source_stamp(job: Job) -> str:
    """A hash of sizes and modification times of the files, and of what the data set says of the case."""
    seen = []
    for path in _files(job):
        try:
            stat = path.stat()
            seen.append((stat.st_size, stat.st_mtime_ns))
        except OSError:
            seen.append((-1, -1))
    return hashlib.sha256(repr((_description(job), seen)).encode()).hexdigest()[:16]


def source_content(job: Job) -> str:
    """A hash of the files' bytes and of what the data set says of the case; empty where a file cannot be read."""
    digests = [_description(job)]
    for path in _files(job):
        try:
            state = path.stat()
            digests.append(_digest_of(path, state.st_size, state.st_mtime_ns))
        except OSError:
            return ""
    return hashlib.sha256(repr(digests).encode()).hexdigest()[:16]


@lru_cache(maxsize=64)
def _digest_of(path: Path, size: int, modified: int) -> str:
    """Sum of a file in one state: cases may share it, as the slices of a 4-D volume and clips of one COCO json do."""
    return file_sha256(path)


def _files(job: Job) -> Iterator[Path]:
    for path in job.ref.files:
        try:
            yield from sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]
        except OSError:  # reading the case reports it
            yield path


def _description(job: Job) -> str:
    """What the data set says of the case. The user's settings are not part of it: `index.json` states these."""
    ref = job.ref
    stated = (ref.layout, ref.modality, ref.labels, ref.spacing, ref.part, ref.recist, ref.split, ref.problem != "")
    return repr((job.patient, stated))
