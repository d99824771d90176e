"""`medsam2 doctor`: whether this machine, or every rank of a job, is fit for training, and how to mend what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from medsam2.training.doctor import Finding, Report
    from medsam2.training.doctor_ranks import Gathered

COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def doctor(
    folder: Annotated[Path, typer.Option("--folder", "-f", help="Where runs are to be written.")] = Path("."),
    cache: Annotated[Path | None, typer.Option("--cache", help="Where remote shards are kept.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object in the place of tables.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds to wait for the other ranks.")] = 30,
) -> None:
    """Look at this machine: versions, devices, driver, NCCL, shared memory, descriptors, disks, network, rights.

    Status 1 means that something is wrong which would stop a run. Started on several ranks (torchrun, srun, or RANK,
    WORLD_SIZE and MASTER_ADDR by hand), rank 0 compares all of them and names those that do not answer.

    [bold]Examples[/bold]

      $ medsam2 doctor --folder /scratch/runs
      $ srun --ntasks-per-node=1 medsam2 doctor
      $ torchrun --nproc-per-node 2 -m medsam2.cli.main doctor --timeout 60
    """
    from medsam2.cli.console import wide_console
    from medsam2.training.doctor import Place, examine
    from medsam2.training.doctor_ranks import Gathered, environment_job, gather

    job = environment_job()
    own = examine(Place(folder, cache), job.rank if job else 0)
    gathered = gather(own, job, timeout) if job else Gathered((own,))
    if gathered is None:
        return
    if as_json:
        print(json.dumps(as_dict(gathered)))
    elif job is None:
        show_one(wide_console(), own)
    else:
        show_job(wide_console(), gathered, job.world)
    if gathered.failed:
        raise typer.Exit(1)


def as_dict(gathered: Gathered) -> dict[str, object]:
    from medsam2.training.doctor_ranks import differences

    return {
        "state": "error" if gathered.failed else max((r.state for r in gathered.reports), key=list(COLOURS).index),
        "silent": list(gathered.silent),
        "differences": [{"name": name, "ranks": values} for name, values in differences(gathered.reports)],
        "ranks": [report.to_dict() for report in gathered.reports],
    }


def show_one(console: Console, report: Report) -> None:
    """A line each; what is wrong has its remedy below it."""
    for finding in report.findings:
        show_finding(console, finding)
    counts = [sum(finding.state == state for finding in report.findings) for state in ("error", "warning")]
    console.print(f"{counts[0]} error(s), {counts[1]} warning(s)")


def show_finding(console: Console, finding: Finding, where: str = "") -> None:
    colour = COLOURS[finding.state]
    console.print(f"[{colour}]{finding.state:<8}[/{colour}]", end="")
    console.print(f" {where}{finding.name}: {finding.value}", markup=False, highlight=False)
    if finding.state != "ok":
        console.print(f"{'':9}-> {finding.advice}", markup=False, highlight=False)


def show_job(console: Console, gathered: Gathered, world: int) -> None:
    """A row a rank, what differs between them, and what is wrong on which."""
    from rich import box
    from rich.table import Table

    from medsam2.training.doctor_ranks import differences, wrong

    table = Table("rank", "host", "GPUs", "memory", "state", title=f"{world} ranks", box=box.SIMPLE_HEAD)
    for report in gathered.reports:
        found = {finding.name: finding.value for finding in report.findings}
        gpus = sum(name.startswith("GPU ") and name[4:].isdigit() for name in found)
        state = f"[{COLOURS[report.state]}]{report.state}[/{COLOURS[report.state]}]"
        table.add_row(str(report.rank), report.host, str(gpus), found.get("memory", ""), state)
    for rank in gathered.silent:
        table.add_row(str(rank), "", "", "", "[red]no answer[/red]")
    console.print(table)
    different = differences(gathered.reports)
    for name, values in different:
        for value, ranks in values.items():
            console.print(f"{name} differs: {value} on {named(ranks)}", markup=False, highlight=False)
    if not different:
        console.print("versions and drivers are the same on all ranks that answered")
    same: dict[Finding, list[int]] = {}
    for report in gathered.reports:
        for finding in wrong(report):
            same.setdefault(finding, []).append(report.rank)
    for finding, ranks in same.items():
        show_finding(console, finding, f"{named(ranks)}: ")
    if gathered.silent:
        console.print(
            f"{named(list(gathered.silent))} did not answer in time: look at their output; are their nodes up, and do "
            "they reach MASTER_ADDR?",
            style="red",
        )


def named(ranks: list[int]) -> str:
    """'rank 1' or 'ranks 0, 2'.

    >>> named([0, 2])
    'ranks 0, 2'
    """
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
