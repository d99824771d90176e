"""Raw data sets -> shards: find, split, stage in parallel, join, publish the index last.

A prepare that is killed and run again goes on where it was and gives the same bytes: see `stage`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medsam2 import __version__
from medsam2.cases.case import CaseError
from medsam2.cases.layouts.registry import CaseRef, find_cases
from medsam2.errors import UserError
from medsam2.files import atomic_write, sync_folder
from medsam2.shards.identity import read_salt, slug
from medsam2.shards.index import ARROW, JSON, write_index
from medsam2.shards.split import assign, read_split_file
from medsam2.shards.stage import Job, Recipe, Staged, make_job, part_path, run_job
from medsam2.shards.summary import summarise
from medsam2.shards.tar import END

STAGING = ".staging"
SHARD_BYTES = 256 << 20
BYTES_PER_WORKER = 32 << 20


@dataclass(frozen=True)
class PrepareOptions:
    """What a user may choose. `shares` of the splits, or a `split_file` that names them.

    `shard_bytes`: a shard is closed before it would grow beyond this (one case always fits).
    """

    recipe: Recipe = Recipe()
    shares: dict[str, float] = field(default_factory=lambda: {"train": 0.8, "val": 0.2})
    split_file: Path | None = None
    seed: int = 0
    layout: str | None = None
    modality: str | None = None
    workers: int = 1
    strict: bool = False
    shard_bytes: int = SHARD_BYTES

    def configuration(self) -> dict[str, Any]:
        """What decides the bytes of the shards, as `index.json` states it; no path and no name is in it."""
        split: Any = self.shares
        if self.split_file:
            split = "file sha256 " + hashlib.sha256(self.split_file.read_bytes()).hexdigest()
        return {
            **self.recipe.to_dict(),
            "split": split,
            "seed": self.seed,
            "layout": self.layout,
            "modality": self.modality,
            "shard_bytes": self.shard_bytes,
            "version": __version__,
        }


@dataclass(frozen=True)
class Prepared:
    """What came out: rows of the index, the failed cases, and notes about mended ones."""

    folder: Path
    summary: dict[str, Any]
    failures: tuple[Staged, ...]
    notes: tuple[tuple[str, str], ...]
    left_out: int
    complete_before: bool = False


Progress = Callable[[int, int, int], None]
"""Called as (cases done, of, failures) after each case."""


def plan_jobs(source: Path, options: PrepareOptions) -> tuple[list[Job], int]:
    """Every case with its split and salted name, and how many cases the split file leaves out.

    Raises:
        UserError: nothing found, or a split that does not fit.
    """
    refs = find_cases(source, options.layout, options.modality)
    splits = split_of(refs, options)
    salt = read_salt()
    jobs = [make_job(ref, splits[ref.dataset, ref.case_id], salt) for ref in refs if _key(ref) in splits]
    if not jobs:
        raise UserError(f"--split-file {options.split_file}: it names no case of {source}.")
    return jobs, len(refs) - len(jobs)


def split_of(refs: Sequence[CaseRef], options: PrepareOptions) -> dict[tuple[str, str], str]:
    """Split of each case by (dataset, case_id)."""
    if options.split_file:
        return read_split_file(options.split_file, refs)
    return assign(refs, options.shares, options.seed)


def prepare(source: Path, out: Path, options: PrepareOptions, progress: Progress | None = None) -> Prepared:
    """Turn every case under `source` into shards in `out`.

    Raises:
        UserError: nothing to prepare, `out` belongs to something else, or a case fails under `strict`.
    """
    jobs, left_out = plan_jobs(source, options)
    with _space(out):
        done = _open_folder(out, options.configuration(), jobs)
    if done is not None:
        return Prepared(out, done, (), (), left_out, complete_before=True)
    staging = out / STAGING
    with _lock(staging), _space(out):
        results = list(_run(jobs, options, staging, progress))
        failures = tuple(sorted((r for r in results if r.error), key=lambda r: _key(r.job.ref)))
        _write_failures(out, failures)
        good = [r for r in results if not r.error]
        if not good:
            raise UserError(f"{source}: none of {len(jobs)} cases could be prepared; first: {failures[0].error}")
        shards, rows = join_shards(good, staging, out, options.shard_bytes)
        summary = summarise(rows, shards, options.configuration(), len(failures))
        write_index(out, rows, summary)
    shutil.rmtree(staging)
    notes = tuple((f"{r.job.ref.dataset}/{r.job.ref.case_id}", note) for r in results for note in r.notes)
    return Prepared(out, summary, failures, notes, left_out)


def join_shards(
    staged: Sequence[Staged], staging: Path, out: Path, limit: int
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Append staged cases to shards in a fixed order; returns bytes and sha256 by shard, and the index rows."""
    groups: dict[str, list[Staged]] = defaultdict(list)
    for result in sorted(staged, key=lambda r: r.job.case):
        groups[f"{slug(result.job.ref.dataset)}-{result.job.split}"].append(result)
    shards: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for name in sorted(groups):
        for number, members in enumerate(_batches(groups[name], limit)):
            shard = f"{name}-{number:06d}.tar"
            shards[shard] = _write_shard(out / shard, members, staging)
            offset = 0
            for result in members:
                rows += [_moved(row, shard, offset) for row in result.rows]
                offset += result.size
    return shards, rows


def _write_shard(path: Path, members: Sequence[Staged], staging: Path) -> dict[str, Any]:
    size = sum(result.size for result in members) + len(END)
    digest = hashlib.sha256()
    with atomic_write(path) as file:
        for result in members:
            with open(part_path(staging, result.job), "rb") as part:
                while block := part.read(1 << 20):
                    digest.update(block)
                    file.write(block)
        digest.update(END)
        file.write(END)
    if path.stat().st_size != size:
        raise UserError(f"{path}: {path.stat().st_size} bytes were written, expected {size}; run it again.")
    return {"bytes": size, "sha256": digest.hexdigest()}


def _batches(results: Sequence[Staged], limit: int) -> Iterator[list[Staged]]:
    batch: list[Staged] = []
    size = 0
    for result in results:
        if batch and size + result.size > limit:
            yield batch
            batch, size = [], 0
        batch.append(result)
        size += result.size
    if batch:
        yield batch


def _moved(row: dict[str, Any], shard: str, offset: int) -> dict[str, Any]:
    moved = {name: [at + offset for at in row[name]] for name in ("frame_offset", "mask_offset")}
    return {**row, **moved, "json_offset": row["json_offset"] + offset, "shard": shard}


def _run(jobs: Sequence[Job], options: PrepareOptions, staging: Path, progress: Progress | None) -> Iterator[Staged]:
    """Results in the order in which they are ready; under `strict` the first failure stops everything."""
    failures = 0
    workers = useful_workers(jobs, options.workers)
    results = _run_here(jobs, options, staging) if workers <= 1 else _run_pool(jobs, options, staging, workers)
    for done, result in enumerate(results, start=1):
        failures += bool(result.error)
        if progress:
            progress(done, len(jobs), failures)
        if result.error and options.strict:
            raise CaseError(f"{result.error} (stopped by --strict; finished cases are kept)")
        yield result


def _run_here(jobs: Sequence[Job], options: PrepareOptions, staging: Path) -> Iterator[Staged]:
    for job in jobs:
        yield run_job(job, options.recipe, staging)


def useful_workers(jobs: Sequence[Job], workers: int) -> int:
    """At most `workers` processes, one for each 32 MB of sources: starting one costs as much as reading that."""
    size, most = 0, min(workers, len(jobs))
    for job in jobs:
        for path in job.ref.files:
            entries = path.iterdir() if path.is_dir() else [path]
            size += sum(entry.stat().st_size for entry in entries if entry.is_file())
        if size // BYTES_PER_WORKER + 1 >= most:
            return most
    return 1 + size // BYTES_PER_WORKER


def _run_pool(jobs: Sequence[Job], options: PrepareOptions, staging: Path, workers: int) -> Iterator[Staged]:
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_single_thread)
    try:
        futures = [pool.submit(run_job, job, options.recipe, staging) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, probably for want of memory; run the same command again with fewer --workers: "
            "finished cases are kept."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _single_thread() -> None:
    """One thread a worker: the cases are what runs in parallel."""
    import cv2
    import SimpleITK as sitk

    cv2.setNumThreads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


def _open_folder(out: Path, configuration: dict[str, Any], jobs: Sequence[Job]) -> dict[str, Any] | None:
    """Make the output folder, or take up one that an equal command left; the summary if it is complete already.

    Raises:
        UserError: the folder holds something else, or shards of another configuration or of other cases.
    """
    if out.is_file():
        raise UserError(f"{out} is a file; give a folder that does not exist yet.")
    staging = out / STAGING
    state = staging / "configuration.json"
    published = (out / ARROW).is_file() and (out / JSON).is_file()
    if published or state.is_file():
        before = json.loads((out / JSON).read_text())["configuration"] if published else json.loads(state.read_text())
        after = json.loads(json.dumps(configuration))
        begun = published or any(staging.glob("*.part"))
        for key in sorted(set(before) | set(after)) if begun else ():
            if before.get(key) != after.get(key):
                raise UserError(
                    f"{out} was prepared with {key}={before.get(key)}, now it is {after.get(key)}; choose another "
                    "folder, or remove this one first."
                )
    if published:
        return _complete(out, jobs)
    if out.is_dir() and any(p.name != STAGING for p in out.iterdir()) and not state.is_file():
        raise UserError(f"{out} already exists and is not empty; choose another folder or remove it first.")
    staging.mkdir(parents=True, exist_ok=True)
    with atomic_write(state, "w") as file:
        json.dump(configuration, file)
    return None


def _complete(out: Path, jobs: Sequence[Job]) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out / JSON).read_text())
    known = set(summary["cases"])
    failed = _count_lines(out / "failures.jsonl")
    new = [job for job in jobs if job.case not in known]
    if len(new) > failed or len(known) + len(new) != len(jobs):
        raise UserError(
            f"{out} is complete with {len(known)} cases, but the source now gives {len(jobs)}; choose another folder, "
            "or remove this one first."
        )
    if (out / STAGING).exists():
        shutil.rmtree(out / STAGING)
    return summary


def _count_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else 0


def _write_failures(out: Path, failures: Sequence[Staged]) -> None:
    """The failed cases by name, for this machine alone; an earlier list is replaced."""
    path = out / "failures.jsonl"
    if not failures:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path, "w") as file:
        for failure in failures:
            ref = failure.job.ref
            entry = {
                "dataset": ref.dataset,
                "case": ref.case_id,
                "patient": ref.patient_id,
                "files": [str(f) for f in ref.files],
                "reason": failure.error,
            }
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


@contextmanager
def _space(out: Path) -> Iterator[None]:
    """A full disk as an error that says what is kept; nothing half-written is published."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{out}: no space left while writing; free some and run the same command again: finished cases are kept."
        ) from None


@contextmanager
def _lock(staging: Path) -> Iterator[None]:
    """One prepare at a time in a folder; the lock falls with the process that holds it."""
    descriptor = os.open(staging / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{staging.parent}: another prepare is writing there; wait for it to end.") from None
        yield
        sync_folder(staging.parent)
    finally:
        os.close(descriptor)


def _key(ref: CaseRef) -> tuple[str, str]:
    return ref.dataset, ref.case_id
