"""Raw data sets -> shards: find, split, stage in parallel, join, publish the index last.

Shards are written once. A prepare that is killed and run again goes on where it was and gives the same bytes (see
`stage`); run again on what it has published, it compares the sources and changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from medsam2.cases.case import CaseError
from medsam2.errors import UserError
from medsam2.files import atomic_write
from medsam2.shards.prepare.folder import (
    DERIVED,
    Output,
    Published,
    begin,
    explain_os_errors,
    find_changes,
    finish,
    locked,
    open_output,
    read_published,
    source_state,
)
from medsam2.shards.prepare.intensity_windows import settle_windows
from medsam2.shards.prepare.plan import Plan, PrepareOptions, make_plan
from medsam2.shards.prepare.pool import KILLED, Workers, choose_workers
from medsam2.shards.prepare.pseudonyms import slug
from medsam2.shards.prepare.publish import index_rows, plan_shards, publish, write_shards
from medsam2.shards.prepare.split import HashedCase, join_duplicates
from medsam2.shards.prepare.stage import Job, Staged, part_path, run_job
from medsam2.shards.summary import summarise

__all__ = ["PrepareOptions", "Prepared", "prepare"]

MAX_CASES_NAMED = 5  # of a kind of change
Note = tuple[str, str]
Progress = Callable[[str, int, int, int], None]
"""Called after each case or shard: (step, number that are done, of how many, number of failed cases).

The steps are counting, preparing, moving, writing and sending.
"""


@dataclass(frozen=True)
class Prepared:
    """The result of a prepare.

    Attributes:
        where: the folder or URL. summary: the content of `index.json`. num_cases: cases that this run prepared.
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
    num_cases: int
    complete_before: bool = False


def prepare(
    source: Path | str,
    out: Path | str,
    options: PrepareOptions | None = None,
    planned: Callable[[Plan], None] = lambda plan: None,
    progress: Progress = lambda *_: None,
) -> Prepared:
    """Turn every case under `source` into shards in `out`, a folder or an fsspec URL.

    Args:
        planned: called once, before anything is read or written.

    Raises:
        UserError: nothing to prepare, `out` belongs to something else or to other data, or a case fails under `strict`.
    """
    options = options or PrepareOptions()
    output, configuration = open_output(out, options.staging), options.configuration()
    with explain_os_errors(output.where):
        published = read_published(output, configuration)
        # processes on other machines have another working folder
        plan = make_plan(Path(source).absolute() if options.dask else source, options)
    planned(plan)
    if published:
        return _compare(output, published, plan)
    with explain_os_errors(output.where), locked(output):
        if read_published(output, configuration):
            raise UserError(f"{output.where}: another prepare has just written there; run the same command again.")
        begin(output, configuration)
        workers = choose_workers([job.ref for job in plan.jobs], options.workers, options.dask)
        return _Run(output, options, plan, workers, progress).prepare()


def _compare(output: Output, published: Published, plan: Plan) -> Prepared:
    """The shards as they are, if the sources are as they were.

    Raises:
        UserError: cases were added, changed or vanished.
    """
    notes = list(plan.notes)
    if published.sources is None:
        notes.append(("source", "these shards keep no states of their sources, so changes of them are not noticed."))
    elif changes := find_changes(plan.jobs, published.sources):
        remedy = "prepare into another --out"
        if [*changes] == ["added"]:
            remedy += (
                ", or only the added cases (in another folder with the dataset's name, or with --exclude-patients) and "
                f"train on both: data.shards=[{output.where},OTHER]"
            )
        counts = ", ".join(
            f"{len(cases)} {kind} ({', '.join(cases[:MAX_CASES_NAMED])}{', ...' * (len(cases) > MAX_CASES_NAMED)})"
            for kind, cases in changes.items()
        )
        raise UserError(f"{output.where}: its cases have changed: {counts}. Shards are written once: {remedy}.")
    # An earlier run was killed after it had published, and before it had cleaned up or in the middle of it.
    if output.begun or any(output.staging.glob("*.part*")):
        with explain_os_errors(output.where), locked(output):
            finish(output)
    return Prepared(output.where, published.summary, (), output.failures, tuple(notes), plan.left_out, 0, True)


@dataclass(frozen=True)
class _Run:
    """One prepare at work, alone in its folders."""

    output: Output
    options: PrepareOptions
    plan: Plan
    workers: Workers
    progress: Progress

    def prepare(self) -> Prepared:
        jobs, windows = settle_windows(self.plan.jobs, self.workers, self._step("counting"))
        results, moves = self._join_duplicates(self._stage(jobs, "preparing"))
        failures = tuple(sorted((r for r in results if r.error), key=lambda r: r.job.name))
        write_failures(self.output.failures, failures)
        prepared = [result for result in results if not result.error]
        if not prepared:
            raise UserError(f"none of {len(jobs)} cases could be prepared; first: {failures[0].error}")
        plans = plan_shards(prepared, self.options.shard_bytes)
        shards, rows = write_shards(plans, self.output, self._step("writing", len(failures))), index_rows(plans)
        configuration = self.options.configuration()
        if windows:
            configuration[DERIVED] = {name: list(window) for name, window in sorted(windows.items())}
        entries = {name: {"bytes": shard.bytes, "sha256": shard.sha256} for name, shard in shards.items()}
        summary = summarise(rows, entries, configuration, len(failures), self.plan.provenance)
        sources = {result.job.case: result.source for result in results}
        publish(self.output, rows, summary, sources, shards, self._step("sending", len(failures)))
        finish(self.output)
        notes = (*self.plan.notes, *((r.job.name, note) for r in results for note in r.notes), *moves)
        where, failures_file = self.output.where, self.output.failures
        return Prepared(where, summary, failures, failures_file, notes, self.plan.left_out, len(prepared))

    def _step(self, name: str, failed: int = 0) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(name, done, total, failed)

    def _stage(self, jobs: Sequence[Job], step: str) -> list[Staged]:
        """Every job's result; under `strict` the first failure stops everything."""
        staging = self.output.staging
        results: list[Staged] = []
        failures = 0
        with closing(self.workers.run(partial(run_job, recipe=self.options.recipe, folder=staging), jobs)) as outcomes:
            for job, outcome in outcomes:
                staged = outcome or Staged(job, source_state(job), error=f"{job.where}: {KILLED}")
                if self.workers.dask and not staged.error and not part_path(staging, job).is_file():
                    raise UserError(
                        f"--staging {staging}: what a worker has written is not seen here; give a folder that this "
                        "machine and all workers share under one path."
                    )
                results.append(staged)
                failures += bool(staged.error)
                self.progress(step, len(results), len(jobs), failures)
                if staged.error and self.options.strict:
                    raise CaseError(f"{staged.error} (stopped by --strict; finished cases are kept)")
        return results

    def _join_duplicates(self, results: list[Staged]) -> tuple[list[Staged], list[Note]]:
        """Stage anew, under its new split, what shares voxels with a case of another split.

        Cases are compared by name, so that the salt has no say in who moves.
        """
        jobs: dict[HashedCase, Job] = {}
        for result in results:
            job, ref = result.job, result.job.ref
            if not result.error:
                content_hash = result.rows[0]["content_hash"]
                jobs[HashedCase(slug(ref.dataset), ref.case_id, ref.patient_id, content_hash, job.split)] = job
        moves = [
            (jobs[case], jobs[leader].split, jobs[leader].name) for case, leader in join_duplicates([*jobs]).items()
        ]
        if not moves:
            return results, []
        shares = "directly or through others it shares voxels with"
        notes = [(job.name, f"moved from {job.split} to {split}: {shares} {like}.") for job, split, like in moves]
        # the part under the old split stays in the staging folder, where it spares a rerun from reading the case twice
        again = self._stage([replace(job, split=split) for job, split, _ in moves], "moving")
        moved = {job.case for job, _, _ in moves}
        return [result for result in results if result.job.case not in moved] + again, notes


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
                "remedy": "Mend what the reason names, or leave the patient out; then prepare into another --out.",
            }
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
