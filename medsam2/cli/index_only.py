"""`medsam2 prepare --index-only`: an index for tars that have none."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from medsam2.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress
    from typer import Context

FLAGS = ("source", "index_only", "workers", "force", "dry_run")
"""The parameters of `medsam2 prepare` that mean something here; the json of a sample says all else."""


def run_index_only(
    context: Context, source: str | None, workers: int, force: bool, dry_run: bool, bar: Progress
) -> None:
    """Index the tars in `source` and print what they hold.

    Args:
        context: of the command: it knows which flags were typed. workers: 0 is one a core.
        bar: not yet started; its tasks need `unit` and `failed`.

    Raises:
        UserError: see `index_tars`, or a flag that says nothing here.
    """
    from medsam2.shards.index_tars import index_tars

    for parameter in context.command.params:
        typed = getattr(context.get_parameter_source(str(parameter.name)), "name", "") == "COMMANDLINE"
        if typed and parameter.name not in FLAGS:
            raise UserError(f"{parameter.opts[0]} does not go with --index-only, which changes no tar; leave it out.")
    if source is None:
        raise UserError("SOURCE is missing: the folder or URL of the tars, e.g. `medsam2 prepare tars/ --index-only`")
    with bar:
        task = bar.add_task("indexing", total=None, failed=0, unit="tars")
        cores = len(os.sched_getaffinity(0))
        summary = index_tars(
            source, workers or cores, force, dry_run, lambda done, total: bar.update(task, completed=done, total=total)
        )
    _report(source, summary, dry_run)


def _report(source: str, summary: dict[str, Any], dry_run: bool) -> None:
    from medsam2.cli.prepare import print_next, print_shards

    print_shards(summary)
    if summary["failed_cases"]:
        print(f"{summary['failed_cases']:,} samples without a labelled structure were left out.")
    if dry_run:
        print("Nothing was written (--dry-run).")
    else:
        print_next(source)
