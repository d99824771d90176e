"""`medsam2 inspect`: what raw data or shards hold."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medsam2.errors import UserError, explain_errors

if TYPE_CHECKING:
    from rich.console import Console

MAX_PROBLEMS, MAX_WARNINGS = 20, 5  # on the terminal, of warnings of a kind


@explain_errors
def inspect(
    path: Annotated[str, typer.Argument(help="Raw data (a folder or one npz file), or a folder of shards.")],
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained page with pictures.")] = None,
    layout: Annotated[str | None, typer.Option(help="Of raw data, where it is not recognised.")] = None,
    modality: Annotated[str | None, typer.Option(help="Of raw data, where it does not say.")] = None,
) -> None:
    """Show what raw data or shards hold, and what is wrong with them.

    Ends with status 1 where something makes the data unfit for use; warnings only say where to look.

    [bold]Examples[/bold]

      $ medsam2 inspect data/
      $ medsam2 inspect shards/ --html shards.html
    """
    from medsam2.shards.index import ARROW

    if re.match(r"\w[\w+.-]+://", path):
        raise UserError(f"{path}: only folders and files of this machine are inspected; copy it here first.")
    if html and html.exists():
        raise UserError(f"--html {html}: already exists; choose another file or remove it first.")
    shards = (Path(path) / ARROW).is_file()
    problems = _inspect_shards(Path(path), html) if shards else _inspect_raw(Path(path), html, layout, modality)
    if problems:
        raise typer.Exit(1)


def _inspect_shards(path: Path, html: Path | None) -> int:
    from medsam2.cli.console import track, wide_console
    from medsam2.reporting.tables import print_table
    from medsam2.shards.checks import by_kind
    from medsam2.shards.index import read_index
    from medsam2.shards.inspect import inspect_shards

    report = inspect_shards(read_index(path), track)
    console = wide_console()
    print_table(report.overview, console)
    print_table(report.structures, console)
    more = "see the page" if html else "see the page (--html FILE)"
    _print_lines(console, [f"problem: {problem}" for problem in report.problems], MAX_PROBLEMS, "red", more)
    for findings in by_kind(report.findings).values():
        _print_lines(console, [f"warning: {finding}" for finding in findings], MAX_WARNINGS, "yellow", more)
    if not report.histograms:
        console.print(report.histogram_note, highlight=False)
    counts = f"{len(report.tables.segments):,} segments, {len(report.problems):,} problems"
    sound = "" if report.problems else "; every shard has the size that index.json states"
    console.print(f"{counts}, {len(report.findings):,} warnings{sound}.", highlight=False)
    if html:
        from medsam2.reporting.page import write_page
        from medsam2.shards.page import shards_page

        write_page(html, shards_page(report, track))
        print(f"page: {html}")
    return len(report.problems)


def _print_lines(console: Console, lines: Sequence[str], most: int, style: str, more: str) -> None:
    for line in lines[:most]:
        console.print(line, style=style, markup=False, highlight=False)
    if len(lines) > most:
        console.print(f"... and {len(lines) - most:,} more of these: {more}", style=style, highlight=False)


def _inspect_raw(path: Path, html: Path | None, layout: str | None, modality: str | None) -> int:
    from medsam2.cases.layouts import find_cases
    from medsam2.cli.cases import print_surveys
    from medsam2.cli.console import track
    from medsam2.cli.prepare import survey_cases

    refs = find_cases(path, layout, modality)
    surveys = survey_cases(refs, len(os.sched_getaffinity(0)))
    print_surveys(surveys)
    if html:
        from medsam2.reporting.page import write_page
        from medsam2.shards.page import cases_page

        write_page(html, cases_page(refs, surveys, track))
        print(f"page: {html}")
    return sum(bool(s.error) for s in surveys)
