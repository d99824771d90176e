"""`medsam2 inspect`: what raw data or shards hold."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from medsam2.errors import UserError, explain_errors

if TYPE_CHECKING:
    from rich.console import Console

    from medsam2.shards.inspect import ShardsReport

T = TypeVar("T")
SHOWN = 20  # lines of a kind on the terminal


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
    from medsam2.cli.console import wide_console
    from medsam2.shards.checks import by_kind
    from medsam2.shards.index import read_index
    from medsam2.shards.inspect import inspect_shards

    report = inspect_shards(read_index(path), _track)
    console = wide_console()
    _print_tables(console, report)
    more = "see the page" if html else "see the page (--html FILE)"
    _print_lines(console, [f"problem: {problem}" for problem in report.problems], "red", more)
    for findings in by_kind(report.findings).values():
        _print_lines(console, [f"warning: {finding}" for finding in findings], "yellow", more)
    if not report.histograms:
        console.print(report.histogram_note, highlight=False)
    segments, found = len(report.tables.segments), len(report.findings)
    sound = "; every shard has the size that index.json states" if not report.problems else ""
    console.print(
        f"{segments:,} segments, {len(report.problems):,} problems, {found:,} warnings{sound}.", highlight=False
    )
    if html:
        from medsam2.shards.page import shards_page

        _write_page(html, shards_page(report, _track))
    return len(report.problems)


def _print_tables(console: Console, report: ShardsReport) -> None:
    from rich.table import Table

    table = Table("modality", "dataset", "split")
    for name in ("patients", "cases", "segments", "frames", "objects", "MB"):
        table.add_column(name, justify="right")
    for group in report.groups:
        counts = (group.patients, group.cases, group.segments, group.frames, group.objects)
        numbers = [f"{count:,}" for count in counts] + [f"{group.bytes / 1e6:,.1f}"]
        table.add_row(group.modality, group.dataset, group.split, *numbers)
    console.print(table)
    table = Table("dataset", "split", "modality", "structure")
    for name in ("patients", "cases", "objects", "frames", "median pixels"):
        table.add_column(name, justify="right")
    for entry in report.structures:
        counts = (entry.patients, entry.cases, entry.objects, entry.frames, round(entry.median_pixels))
        table.add_row(entry.dataset, entry.split, entry.modality, entry.structure, *(f"{count:,}" for count in counts))
    console.print(table)


def _print_lines(console: Console, lines: Sequence[str], style: str, more: str) -> None:
    for line in lines[:SHOWN]:
        console.print(line, style=style, markup=False, highlight=False)
    if len(lines) > SHOWN:
        console.print(f"... and {len(lines) - SHOWN:,} more of these: {more}", style=style, highlight=False)


def _track(items: Sequence[T], description: str) -> Iterable[T]:
    """A progress bar on stderr, gone when it is done."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, description, console=console, transient=True, disable=not console.is_terminal)


def _inspect_raw(path: Path, html: Path | None, layout: str | None, modality: str | None) -> int:
    from medsam2.cases.layouts import find_cases
    from medsam2.cli.cases import print_surveys
    from medsam2.cli.prepare import survey_cases

    refs = find_cases(path, layout, modality)
    surveys = survey_cases(refs, len(os.sched_getaffinity(0)))
    print_surveys(surveys)
    if html:
        from medsam2.shards.page import cases_page

        _write_page(html, cases_page(refs, surveys, _track))
    return sum(bool(s.error) for s in surveys)


def _write_page(path: Path, content: str) -> None:
    from medsam2.files import atomic_write

    with atomic_write(path, "w") as file:
        file.write(content)
    print(f"page: {path}")
