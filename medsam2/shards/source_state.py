"""Whether the sources of a case have changed since it was prepared: cheap by sizes and times, sure by content.

`sources.json` beside the shards holds the state of every case under its salted id. Only `medsam2 prepare` reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medsam2.shards.stage import Job

SOURCES = "sources.json"


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
            with open(path, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError:
            return ""
    return hashlib.sha256(repr(digests).encode()).hexdigest()[:16]


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
