"""Convert raw datasets to shards: find and split cases, stage them in parallel, join them, publish the index last.

Shards are written once. A killed prepare that is run again resumes and gives the same bytes (see `stage`). Run again
on published shards, it compares the source files and changes nothing.
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
    DERIVED_KEY,
    Output,
    PublishedShards,
    explain_os_errors,
    find_changes,
    lock_output,
    open_output,
    read_published,
    remove_staging,
    source_state,
    start_staging,
)
from medsam2.shards.prepare.intensity_windows import resolve_windows
from medsam2.shards.prepare.plan import Plan, PrepareOptions, make_plan
from medsam2.shards.prepare.pool import WORKER_KILLED, Workers, choose_workers
from medsam2.shards.prepare.pseudonyms import slug
from medsam2.shards.prepare.publish import index_rows, plan_shards, publish, write_shards
from medsam2.shards.prepare.split import HashedCase, join_duplicates
from medsam2.shards.prepare.stage import Job, StagedCase, part_path, run_job
from medsam2.shards.summary import summarise

__all__ = ["PrepareOptions", "PrepareResult", "prepare"]

MAX_CASES_NAMED = 5  # per kind of change
Note = tuple[str, str]
Progress = Callable[[str, int, int, int], None]
"""Called after each case or shard with (step, number finished, total, number of failed cases).

The steps are counting, preparing, moving, writing and sending.
"""


@dataclass(frozen=True)
class PrepareResult:
    """The result of a prepare.

    Attributes:
        where: the folder or URL. summary: the content of `index.json`.
        failures: cases that could not be prepared; `failures_file` lists them.
        notes: (case or topic, text) for the user.
        num_left_out: number of cases that the split file does not list. num_cases: number of prepared cases.
        already_complete: the shards were complete before this run.
    """

    where: str
    summary: dict[str, Any]
    failures: tuple[StagedCase, ...]
    failures_file: Path
    notes: tuple[Note, ...]
    num_left_out: int
    num_cases: int
    already_complete: bool = False


def prepare(
    source: Path | str,
    out: Path | str,
    options: PrepareOptions | None = None,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    progress: Progress = lambda *_: None,
) -> PrepareResult:
    """Convert every case under `source` to shards in `out`, a folder or an fsspec URL.

    Args:
        on_plan: called once, before cases are read or files written.

    Raises:
        UserError: there is no case, `out` holds other files or other shards, or a case fails under `strict`.
    """
    options = options or PrepareOptions()
    output, configuration = open_output(out, options.staging), options.configuration()
    with explain_os_errors(output.where):
        published = read_published(output, configuration)
        # Workers on other machines have another working directory, hence the absolute path.
        plan = make_plan(Path(source).absolute() if options.dask else source, options)
    on_plan(plan)
    if published:
        return _compare(output, published, plan)
    with explain_os_errors(output.where), lock_output(output):
        if read_published(output, configuration):
            raise UserError(f"{output.where}: another prepare has just written there; run the same command again.")
        start_staging(output, configuration)
        workers = choose_workers([job.ref for job in plan.jobs], options.workers, options.dask)
        return _Run(output, options, plan, workers, progress).prepare()


def _compare(output: Output, published: PublishedShards, plan: Plan) -> PrepareResult:
    """Return the published shards if their sources are unchanged.

    Raises:
        UserError: cases were added, changed or removed.
    """
    notes = list(plan.notes)
    if published.sources is None:
        notes.append(("source", "these shards do not record their sources, so changes of them are not noticed."))
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
    # An earlier run was killed after publishing, before it had removed all of its staging folder.
    if output.is_resumable or any(output.staging.glob("*.part*")):
        with explain_os_errors(output.where), lock_output(output):
            remove_staging(output)
    return PrepareResult(output.where, published.summary, (), output.failures, tuple(notes), plan.num_left_out, 0, True)


@dataclass(frozen=True)
class _Run:
    """One prepare in its locked folders."""

    output: Output
    options: PrepareOptions
    plan: Plan
    workers: Workers
    progress: Progress

    def prepare(self) -> PrepareResult:
        jobs, windows = resolve_windows(self.plan.jobs, self.workers, self._step("counting"))
        results, moves = self._join_duplicates(self._stage(jobs, "preparing"))
        failures = tuple(sorted((r for r in results if r.error), key=lambda r: r.job.name))
        write_failures(self.output.failures, failures)
        prepared = [result for result in results if not result.error]
        if not prepared:
            raise UserError(f"none of {len(jobs)} cases could be prepared; first: {failures[0].error}")
        plan = plan_shards(prepared, self.options.shard_bytes)
        shards, rows = write_shards(plan, self.output, self._step("writing", len(failures))), index_rows(plan)
        configuration = self.options.configuration()
        if windows:
            configuration[DERIVED_KEY] = {name: list(window) for name, window in sorted(windows.items())}
        entries = {name: {"bytes": shard.bytes, "sha256": shard.sha256} for name, shard in shards.items()}
        summary = summarise(rows, entries, configuration, len(failures), self.plan.provenance)
        sources = {result.job.case: result.source for result in results}
        publish(self.output, rows, summary, sources, shards, self._step("sending", len(failures)))
        remove_staging(self.output)
        notes = (*self.plan.notes, *((r.job.name, note) for r in results for note in r.notes), *moves)
        where, failures_file = self.output.where, self.output.failures
        return PrepareResult(where, summary, failures, failures_file, notes, self.plan.num_left_out, len(prepared))

    def _step(self, name: str, failed: int = 0) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(name, done, total, failed)

    def _stage(self, jobs: Sequence[Job], step: str) -> list[StagedCase]:
        """Stage every job; under `strict` the first failure ends the run."""
        staging = self.output.staging
        results: list[StagedCase] = []
        failures = 0
        with closing(self.workers.run(partial(run_job, recipe=self.options.recipe, folder=staging), jobs)) as outcomes:
            for job, outcome in outcomes:
                staged = outcome or StagedCase(job, source_state(job), error=f"{job.where}: {WORKER_KILLED}")
                if self.workers.dask and not staged.error and not part_path(staging, job).is_file():
                    raise UserError(
                        f"--staging {staging}: files of a worker do not appear here; give a folder that this machine "
                        "and all workers share under the same path."
                    )
                results.append(staged)
                failures += bool(staged.error)
                self.progress(step, len(results), len(jobs), failures)
                if staged.error and self.options.strict:
                    raise CaseError(f"{staged.error} (stopped by --strict; a rerun reuses finished cases)")
        return results

    def _join_duplicates(self, results: list[StagedCase]) -> tuple[list[StagedCase], list[Note]]:
        """Stage again, under their new split, the cases that share voxels with a case of another split.

        Cases are ordered by name, so that the salt does not decide which of them move.
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
        reason = "it shares voxels, directly or through other cases, with"
        notes = [(job.name, f"moved from {job.split} to {split}: {reason} {leader}.") for job, split, leader in moves]
        # The part under the old split stays in the staging folder: with it, a rerun does not read the case twice.
        restaged = self._stage([replace(job, split=split) for job, split, _ in moves], "moving")
        moved = {job.case for job, _, _ in moves}
        return [result for result in results if result.job.case not in moved] + restaged, notes


def write_failures(path: Path, failures: Sequence[StagedCase]) -> None:
    """Write the list of failed cases, with their names and salted patients; it stays on this machine."""
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
                "remedy": "Fix what the reason names, or leave the patient out; then prepare into another --out.",
            }
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
