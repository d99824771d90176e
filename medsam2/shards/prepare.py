"""Raw data sets -> shards: find, split, stage in parallel, join, publish the index last.

A prepare that is killed and run again goes on where it was and gives the same bytes: see `stage`. Into shards that are
published already it adds what is new; no shard that exists is touched.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from medsam2.cases.case import CaseError
from medsam2.cases.settings import Window
from medsam2.errors import UserError
from medsam2.files import atomic_write
from medsam2.shards.folder import DERIVED, Output, Published, begin, finish, locked, open_output, read_published, told
from medsam2.shards.identity import slug
from medsam2.shards.index import ARROW, JSON
from medsam2.shards.plan import Plan, PrepareOptions, make_plan
from medsam2.shards.pool import Workers, open_workers, run_all, useful_workers
from medsam2.shards.publish import plan_shards, publish, write_shards
from medsam2.shards.split import Hashed, Joined, join_duplicates
from medsam2.shards.stage import Job, Staged, part_path, run_job
from medsam2.shards.summary import summarise
from medsam2.shards.windows import settle_windows

__all__ = ["PrepareOptions", "Prepared", "Watch", "prepare"]

Note = tuple[str, str]
SHARED_SECONDS = 30.0


class Watch:
    """What a caller may follow; does nothing by itself."""

    def planned(self, plan: Plan) -> None:
        """Called once, before anything is read or written."""

    def progressed(self, step: str, done: int, total: int, failed: int) -> None:
        """Called after each case or shard; `step` is one word: counting, preparing, moving, writing."""


@dataclass(frozen=True)
class Prepared:
    """What came out.

    Attributes:
        where: the folder or URL. summary: the content of `index.json`. added: cases that are new in it.
        failures: cases that could not be prepared; `failures_file` lists them.
        notes: what the user should know, each with the case or thing that it is about.
        complete_before: there was nothing to do.
    """

    where: str
    summary: dict[str, Any]
    failures: tuple[Staged, ...]
    failures_file: Path
    notes: tuple[Note, ...]
    left_out: int
    added: int
    complete_before: bool = False


def prepare(
    source: Path | str, out: Path | str, options: PrepareOptions | None = None, watch: Watch | None = None
) -> Prepared:
    """Turn every case under `source` into shards in `out`, a folder or an fsspec URL.

    Raises:
        UserError: nothing to prepare, `out` belongs to something else, or a case fails under `strict`.
    """
    options, watch = options or PrepareOptions(), watch or Watch()
    output = open_output(out, options.staging)
    with told(output.target.where):
        published = read_published(output, options.configuration())
        # processes on other machines have another working folder
        plan = make_plan(Path(source).absolute() if options.dask else source, options, published)
    watch.planned(plan)
    if published and not plan.jobs:
        return _nothing_to_do(output, published, plan)
    if not plan.jobs:
        raise UserError(f"{source}: every case is of a patient who was taken out of {output.target.where}.")
    with told(output.target.where), locked(output):
        _refuse_changed(output, published)
        begin(output, options.configuration())
        sources = [job.ref.files for job in plan.jobs]
        count = 0 if options.dask else useful_workers(sources, options.workers)
        with open_workers(count, options.dask) as workers:
            return _Run(output, options, plan, published, workers, watch).prepare()


def _nothing_to_do(output: Output, published: Published, plan: Plan) -> Prepared:
    if output.begun:
        # killed after the index was published, and before it had cleaned up
        with told(output.target.where), locked(output):
            finish(output)
    where, failures = output.target.where, output.failures
    return Prepared(where, published.summary, (), failures, plan.notes, plan.left_out, 0, complete_before=True)


def _refuse_changed(output: Output, published: Published | None) -> None:
    """Whoever held the lock a moment ago may have published in between."""
    if published:
        changed = json.loads(output.target.read(JSON)) != published.summary
    else:
        changed = {JSON, ARROW} <= set(output.target.names())
    if changed:
        raise UserError(f"{output.target.where}: another prepare has just written there; run the same command again.")


@dataclass
class _Run:
    """One prepare at work, alone in its folders."""

    output: Output
    options: PrepareOptions
    plan: Plan
    published: Published | None
    workers: Workers
    watch: Watch

    def prepare(self) -> Prepared:
        jobs, windows = self._with_windows()
        results = self._stage(jobs, "preparing")
        results, joined = self._move_duplicates(results)
        failures = tuple(sorted((r for r in results if r.error), key=lambda r: (r.job.ref.dataset, r.job.ref.case_id)))
        write_failures(self.output.failures, failures)
        good = [result for result in results if not result.error]
        if not good and not self.published:
            raise UserError(f"none of {len(jobs)} cases could be prepared; first: {failures[0].error}")
        taken = self.published.used_names if self.published else ()
        plans = plan_shards(good, self.options.shard_bytes, taken)
        new, rows = write_shards(plans, self.output, self.published, self._step("writing", len(failures)))
        summary = self._summary(rows, new, windows, joined, len(failures))
        if good or (self.published and summary != self.published.summary):
            publish(self.output, (self.published.rows() if self.published else []) + rows, summary)
        finish(self.output)
        notes = (*self.plan.notes, *self._notes(results, joined), *(("dask", n) for n in self.workers.notes))
        return Prepared(
            self.output.target.where, summary, failures, self.output.failures, notes, self.plan.left_out, len(good)
        )

    def _step(self, name: str, failed: int = 0) -> Callable[[int, int], None]:
        return lambda done, total: self.watch.progressed(name, done, total, failed)

    def _with_windows(self) -> tuple[list[Job], dict[str, Window]]:
        """Windows that depend on all training cases of a data set; those that are published hold for added cases."""
        stated = self.published.summary["configuration"].get(DERIVED, {}) if self.published else {}
        before = {name: (float(low), float(high)) for name, (low, high) in stated.items()}
        return settle_windows(self.plan.jobs, before, self.output.staging, self.workers, self._step("counting"))

    def _stage(self, jobs: Sequence[Job], step: str) -> list[Staged]:
        """Every job's result; under `strict` the first failure stops everything."""
        function = partial(run_job, recipe=self.options.recipe, folder=self.output.staging)
        results: list[Staged] = []
        failures = 0
        with closing(run_all(function, jobs, self.workers)) as outcomes:
            for job, outcome in outcomes:
                staged = outcome or Staged(job, error=_killed(job))
                if self.options.dask and not staged.error:
                    _wait_for(part_path(self.output.staging, job), staged.size)
                results.append(staged)
                failures += bool(staged.error)
                self.watch.progressed(step, len(results), len(jobs), failures)
                if staged.error and self.options.strict:
                    raise CaseError(f"{staged.error} (stopped by --strict; finished cases are kept)")
        return results

    def _move_duplicates(self, results: list[Staged]) -> tuple[list[Staged], Joined]:
        """Stage anew, under its new split, what shares voxels with a case of another split.

        Cases are compared by name, where it is known, so that the salt has no say in who moves.
        """
        persons = self.plan.persons
        cases = [
            Hashed(*self._name(job), persons[job.patient], r.rows[0]["content_hash"], job.split, settled=False)
            for r in results
            if not r.error and (job := r.job)
        ]
        names = {job.case: self._name(job) for job in self.plan.kept}
        for old in self.published.cases.values() if self.published else ():
            name = names.get(old.case, (old.dataset, old.case))
            person = persons.get(old.patient, old.patient)
            cases.append(Hashed(*name, person, old.content_hash, old.split, settled=True))
        joined = join_duplicates(cases)
        moved = {}
        for result in results:
            job = result.job
            split = joined.splits.get(self._name(job), job.split)
            if split != job.split:
                moved[job.case] = replace(job, split=split)
        if not moved:
            return results, joined
        # the part under the old split stays in the staging folder, where it spares a rerun from reading the case twice
        return [r for r in results if r.job.case not in moved] + self._stage(list(moved.values()), "moving"), joined

    @staticmethod
    def _name(job: Job) -> tuple[str, str]:
        return slug(job.ref.dataset), job.ref.case_id

    def _summary(
        self,
        rows: Sequence[dict[str, Any]],
        shards: dict[str, dict[str, Any]],
        windows: dict[str, Window],
        joined: Joined,
        failed: int,
    ) -> dict[str, Any]:
        """`index.json` of what was published and what is new; keys that others have put there stay."""
        old = self.published
        before = old.summary if old else {}
        configuration = self.options.configuration()
        if windows:
            configuration[DERIVED] = {name: list(window) for name, window in sorted(windows.items())}
        jobs = {self._name(job): job for job in [*self.plan.kept, *self.plan.jobs]}
        moves = [
            {
                "patient": jobs[move.dataset, move.case_ids[0]].patient,
                "dataset": move.dataset,
                "before": move.before,
                "after": move.after,
                "like": jobs[move.like].case if move.like in jobs else move.like[1],
            }
            for move in joined.moves
        ]
        summary = summarise(
            (old.rows() if old else []) + list(rows),
            {**(old.shards if old else {}), **shards},
            configuration,
            failed,
            {**before.get("datasets", {}), **self.plan.provenance},
            before.get("removed_patients", ()),
            _distinct([*before.get("moved_patients", ()), *moves]),
        )
        merged = {**{key: value for key, value in before.items() if key not in summary}, **summary}
        return dict(json.loads(json.dumps(merged)))  # as it is read again, so that the two can be compared

    def _notes(self, results: Sequence[Staged], joined: Joined) -> list[Note]:
        notes = [(f"{r.job.ref.dataset}/{r.job.ref.case_id}", note) for r in results for note in r.notes]
        for move in joined.moves:
            cases = ", ".join(f"{move.dataset}/{case}" for case in move.case_ids)
            text = f"moved from {move.before} to {move.after}: it shares voxels with {'/'.join(move.like)}."
            notes.append((cases, text))
        for patients in joined.conflicts:
            notes.append(
                ("warning", f"prepared patients with the same voxels stand in different splits: {', '.join(patients)}")
            )
        return notes + _unused_windows(results)


def _wait_for(part: Path, size: int) -> None:
    """A part that a worker elsewhere has written; a network file system may show it a little later.

    Raises:
        UserError: it does not come: the staging folder is not shared.
    """
    for _ in range(int(SHARED_SECONDS * 10)):
        if part.is_file() and part.stat().st_size == size:
            return
        time.sleep(0.1)
    raise UserError(
        f"--staging {part.parent}: what a worker has written is not seen here; give a folder that this machine and all "
        "workers share under one path."
    )


def _killed(job: Job) -> str:
    where = job.ref.files[0] if job.ref.files else job.ref.case_id
    return (
        f"{where}: the worker reading it was killed, probably for want of memory; give it more (fewer --workers), or "
        "leave the case out."
    )


def _unused_windows(results: Sequence[Staged]) -> list[Note]:
    """Data sets for which numbers were given although all of their frames are stored as they came."""
    windows: dict[str, set[str]] = defaultdict(set)
    for result in results:
        if any(isinstance(window, tuple) for window in result.job.ref.settings.wanted_windows):
            windows[result.job.ref.dataset] |= {row["window"] for row in result.rows}
    return [
        (name, "the window had no effect: these are pictures of 8 bits, which stay as stored.")
        for name, used in sorted(windows.items())
        if used == {"as stored"}
    ]


def _distinct(moves: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return list({json.dumps(move, sort_keys=True): move for move in moves}.values())


def write_failures(path: Path, failures: Sequence[Staged]) -> None:
    """The failed cases by name, for this machine alone; an earlier list is replaced. Patients stand as hashes."""
    if not failures:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path, "w") as file:
        for failure in failures:
            ref = failure.job.ref
            entry = {
                "dataset": ref.dataset,
                "case": ref.case_id,
                "patient": failure.job.patient,
                "files": [str(f) for f in ref.files],
                "reason": failure.error,
                "remedy": "Mend what the reason names, or leave the case out; the same command tries it again.",
            }
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
