"""The output of `medsam2 prepare`: folder of the shards, staging folder, lock, and shards published earlier.

`sources.json` beside the shards holds the state of every case's source files under its salted id. A repeated prepare
compares it with the files: first their sizes and modification times, then, if these differ, their content.
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
from medsam2.shards.index import INDEX_FILE, SUMMARY_FILE
from medsam2.shards.target import UrlFolder, mask_secrets, open_folder

if TYPE_CHECKING:
    from medsam2.shards.prepare.stage import Job

STAGING = ".staging"
SOURCES = "sources.json"
CONFIGURATION = "configuration.json"
FAILURES = "failures.jsonl"
DERIVED_KEY = "dataset_windows"
"""Key of the configuration in `index.json` whose values were computed from the data, not set by the user."""


@dataclass(frozen=True)
class Output:
    """The output of a prepare.

    Attributes:
        where: the folder or URL, for messages.
        folder: the local folder in which shards and index are written. url: where they are uploaded at the end.
        staging: the local folder in which cases are staged.
        failures: the list of failed cases. It holds their names and stays on this machine.
    """

    where: str
    folder: Path
    staging: Path
    failures: Path
    url: UrlFolder | None = None

    @property
    def is_resumable(self) -> bool:
        """Whether an interrupted run can be resumed."""
        return (self.staging / CONFIGURATION).is_file()

    def list_names(self) -> set[str]:
        """List the files and folders of the published folder or URL."""
        if self.url:
            return set(self.url.sizes())
        return {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()

    def read(self, name: str) -> bytes:
        """Read a file of the published folder or URL."""
        return self.url.read(name) if self.url else (self.folder / name).read_bytes()


@dataclass(frozen=True)
class SourceState:
    """The state of a case's source files when they were read.

    Attributes:
        patient: the salted id.
        stamp: a hash of file sizes, modification times and the dataset's metadata of the case.
        content: a hash of the files' bytes and the same metadata; empty if a file could not be read.
    """

    patient: str
    stamp: str
    content: str = ""


@dataclass(frozen=True)
class PublishedShards:
    """Published shards: the content of `index.json`, and the states of their sources by salted case id.

    `sources` is None for shards of an earlier version, which did not store these states.
    """

    summary: dict[str, Any]
    sources: dict[str, SourceState] | None


def open_output(out: str | Path, staging: Path | None = None) -> Output:
    """Resolve `out` and its staging folder without creating them.

    Args:
        staging: a folder in which each output gets a subfolder. The default is `OUT/.staging`, or the user's cache
            folder for a URL.

    Raises:
        UserError: `out` is a file, or a URL that cannot be opened.
    """
    place = open_folder(out)
    if isinstance(place, Path) and place.is_file():
        raise UserError(f"{place} is a file; give a folder that does not exist yet.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medsam2" / "staging"
    name = hashlib.sha256(str(out if isinstance(place, UrlFolder) else place.resolve()).encode()).hexdigest()[:16]
    # A subfolder per output: removing it never deletes other files of the user.
    of_out = (cache if staging is None else staging.absolute()) / name
    if isinstance(place, UrlFolder):
        return Output(mask_secrets(str(out)), of_out / "shards", of_out, of_out.with_name(f"{name}-{FAILURES}"), place)
    return Output(str(place), place, place.absolute() / STAGING if staging is None else of_out, place / FAILURES)


def read_published(output: Output, configuration: dict[str, Any]) -> PublishedShards | None:
    """Read the published shards; returns None if nothing is published yet.

    Raises:
        UserError: the output holds other files, or shards of another configuration.
    """
    names = output.list_names()
    if {INDEX_FILE, SUMMARY_FILE} <= names:
        try:
            summary = dict(json.loads(output.read(SUMMARY_FILE)))
            states = json.loads(output.read(SOURCES)) if SOURCES in names else None
            sources = None if states is None else {case: SourceState(**state) for case, state in states.items()}
            before = dict(summary["configuration"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{output.where}: {SUMMARY_FILE} or {SOURCES} is damaged ({error!r}); choose another --out."
            ) from None
        _check_configuration(output.where, before, configuration)
        return PublishedShards(summary, sources)
    if output.is_resumable:
        if any(output.staging.glob("*.part")):
            _check_configuration(output.where, json.loads((output.staging / CONFIGURATION).read_text()), configuration)
    elif names - {STAGING}:
        raise UserError(f"{output.where} already exists and is not empty; choose another folder or remove it first.")
    return None


def _check_configuration(where: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    old, new = (dict(_flatten(settings)) for settings in (before, json.loads(json.dumps(after))))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and not key.startswith(DERIVED_KEY):
            raise UserError(
                f"{where} was prepared with {key}={old.get(key)}, now it is {new.get(key)}; choose another folder, or "
                "remove this one first."
            )


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings under dotted names."""
    for name, value in settings.items():
        yield from _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]


@contextmanager
def lock_output(output: Output) -> Iterator[None]:
    """Create the folders and lock them against other prepares; the lock ends with the process.

    Raises:
        UserError: another prepare is writing there.
    """
    output.staging.mkdir(parents=True, exist_ok=True)
    with lock_folder(output.staging if output.url else output.folder / STAGING, output.where):
        output.folder.mkdir(parents=True, exist_ok=True)
        yield


@contextmanager
def lock_folder(folder: Path, where: str, other: str = "prepare") -> Iterator[None]:
    """Create `folder` and hold its lock.

    Raises:
        UserError: another process holds the lock; the message calls it `other`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lock").touch()
    with try_lock(folder / "lock") as free:
        if free is False:
            raise UserError(f"{where}: another {other} is writing there; wait for it to end.")
        yield  # some file systems have no locks: there, nothing stops two prepares at once


def start_staging(output: Output, configuration: dict[str, Any]) -> None:
    """Write the configuration into the staging folder, so that the same command can resume."""
    with atomic_write(output.staging / CONFIGURATION, "w") as file:
        json.dump(configuration, file)


def remove_staging(output: Output) -> None:
    """Remove the staging folder."""
    shutil.rmtree(output.staging)
    if not output.url:
        shutil.rmtree(output.folder / STAGING, ignore_errors=True)
        sync_folder(output.folder)


@contextmanager
def explain_os_errors(where: str) -> Iterator[None]:
    """Raise errors of the file system as a `UserError` with a remedy; nothing incomplete is published."""
    try:
        yield
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        reason = f"{name}{error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "no space left while writing; free some"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            remedy = f"cannot be written ({reason}); fix that or choose another folder,"
        else:
            remedy = f"writing failed ({reason}); fix that"
        raise UserError(f"{where}: {remedy} and run the same command again: finished cases are reused.") from None


# ------------------------------------------------------------------------------------------- states of the sources


def find_changes(jobs: Sequence[Job], before: Mapping[str, SourceState]) -> dict[str, list[str]]:
    """Compare the cases with the states `before` (by salted case id).

    Returns:
        Names (dataset/case) of the "added" and "changed" cases, and salted ids of the "removed" ones. A kind of change
        without cases has no entry.
    """
    removed = [*before.keys() - {job.case for job in jobs}]
    changes: dict[str, list[str]] = {"added": [], "changed": [], "removed": removed}
    for job in jobs:
        state = before.get(job.case)
        if state is None:
            changes["added"].append(job.name)
        elif state.stamp != source_stamp(job) and state.content != source_content(job):
            changes["changed"].append(job.name)
    return {kind: cases for kind, cases in changes.items() if cases}


def source_state(job: Job) -> SourceState:
    """Read the current state of a case's source files."""
    return SourceState(job.patient, source_stamp(job), source_content(job))


def source_stamp(job: Job) -> str:
    """Hash the files' sizes and modification times and the dataset's metadata of the case."""
    stats = []
    for path in _source_files(job):
        try:
            stat = path.stat()
            stats.append((stat.st_size, stat.st_mtime_ns))
        except OSError:
            stats.append((-1, -1))
    return hashlib.sha256(repr((_case_description(job), stats)).encode()).hexdigest()[:16]


def source_content(job: Job) -> str:
    """Hash the files' bytes and the dataset's metadata of the case; empty if a file cannot be read."""
    digests = [_case_description(job)]
    for path in _source_files(job):
        try:
            stat = path.stat()
            digests.append(_file_digest(path, stat.st_size, stat.st_mtime_ns))
        except OSError:
            return ""
    return hashlib.sha256(repr(digests).encode()).hexdigest()[:16]


@lru_cache(maxsize=64)
def _file_digest(path: Path, size: int, modified: int) -> str:
    """The sha256 of a file in one state, cached: volumes of a 4-D scan and clips of a COCO json share their file."""
    return file_sha256(path)


def _source_files(job: Job) -> Iterator[Path]:
    for path in job.ref.files:
        try:
            yield from sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]
        except OSError:  # reading the case reports the error
            yield path


def _case_description(job: Job) -> str:
    """The dataset's metadata of the case. The user's settings are in the configuration of `index.json` instead."""
    ref = job.ref
    metadata = (ref.layout, ref.modality, ref.labels, ref.spacing, ref.part, ref.recist, ref.split, ref.problem != "")
    # The state of a case in an existing `sources.json` holds the former name of this field of `Part`.
    return repr((job.patient, metadata)).replace("file_per_structure=", "file_each=")
