"""`medsam2 inspect`: show the content of raw data or shards, and its problems."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medsam2.errors import UserError, explain_errors

if TYPE_CHECKING:
    from rich.console import Console

    from medsam2.cases.case import CaseRef
    from medsam2.shards.inspect.survey import CaseSurvey

MAX_PROBLEMS = 20  # on the terminal
MAX_WARNINGS = 5  # on the terminal, per kind
MAX_CASES_LISTED = 40  # on a terminal; more cases are summarised per dataset


@explain_errors
def inspect(
    path: Annotated[str, typer.Argument(help="Raw data (a folder or one npz file), or a folder of shards.")],
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained page with pictures.")] = None,
    layout: Annotated[str | None, typer.Option(help="Layout of raw data, if not recognised.")] = None,
    modality: Annotated[str | None, typer.Option(help="Modality of raw data, if not given there.")] = None,
) -> None:
    """Show the content of raw data or shards, and its problems.

    The exit status is 1 if a problem makes the data unusable. Warnings only point at unusual values.

    [bold]Examples[/bold]

      $ medsam2 inspect data/
      $ medsam2 inspect shards/ --html shards.html
    """
    from medsam2.shards.index import INDEX_FILE

    if re.match(r"\w[\w+.-]+://", path):
        raise UserError(f"{path}: only folders and files on this machine can be inspected; copy it here first.")
    if html and html.exists():
        raise UserError(f"--html {html}: already exists; choose another file or remove it first.")
    shards = (Path(path) / INDEX_FILE).is_file()
    problems = _inspect_shards(Path(path), html) if shards else _inspect_raw(Path(path), html, layout, modality)
    if problems:
        raise typer.Exit(1)


def _inspect_shards(path: Path, html: Path | None) -> int:
    from medsam2.cli.console import track, wide_console
    from medsam2.reporting.tables import print_table
    from medsam2.shards.index import read_index
    from medsam2.shards.inspect.checks import by_kind
    from medsam2.shards.inspect.survey import inspect_shards

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
    sizes = "" if report.problems else "; every shard has the size that index.json states"
    console.print(f"{counts}, {len(report.findings):,} warnings{sizes}.", highlight=False)
    if html:
        from medsam2.reporting.page import write_page
        from medsam2.shards.inspect.page import shards_page

        write_page(html, shards_page(report, track))
        print(f"page: {html}")
    return len(report.problems)


def _print_lines(console: Console, lines: Sequence[str], max_lines: int, style: str, more: str) -> None:
    for line in lines[:max_lines]:
        console.print(line, style=style, markup=False, highlight=False)
    if len(lines) > max_lines:
        console.print(f"... and {len(lines) - max_lines:,} more of these: {more}", style=style, highlight=False)


def _inspect_raw(path: Path, html: Path | None, layout: str | None, modality: str | None) -> int:
    from medsam2.cases.layouts import find_cases
    from medsam2.cli.console import track

    refs = find_cases(path, layout, modality)
    surveys = survey_cases(refs, len(os.sched_getaffinity(0)))
    print_surveys(surveys)
    if html:
        from medsam2.reporting.page import write_page
        from medsam2.shards.inspect.page import cases_page

        write_page(html, cases_page(refs, surveys, track))
        print(f"page: {html}")
    return sum(bool(s.error) for s in surveys)


def survey_cases(refs: Sequence[CaseRef], max_processes: int, dask: str | None = None) -> list[CaseSurvey]:
    """Read and describe all cases in the order of `refs`, with a progress bar."""
    from medsam2.cli.console import track
    from medsam2.shards.inspect.survey import CaseSurvey, survey_case
    from medsam2.shards.prepare.pool import WORKER_KILLED, choose_workers

    surveys: dict[int, CaseSurvey] = {}
    results = choose_workers(refs, max_processes, dask).run(survey_case, refs)
    for ref, survey in track(results, "reading", total=len(refs)):
        surveys[id(ref)] = survey or CaseSurvey(ref, error=WORKER_KILLED)
    return [surveys[id(ref)] for ref in refs]


def print_surveys(surveys: Sequence[CaseSurvey], splits: Mapping[tuple[str, str], str] | None = None) -> None:
    """Print a line per case, or per dataset if there are too many for a terminal; then all notes and errors."""
    from medsam2.cli.console import wide_console
    from medsam2.reporting.tables import Table, numbers, print_table, words

    console = wide_console()
    listed = len(surveys) <= MAX_CASES_LISTED or not console.is_terminal
    rows: dict[tuple[str, ...], list[CaseSurvey]] = {}
    for survey in surveys:
        ref = survey.ref
        case = (ref.case_id,) if listed else ()
        split = (splits.get((ref.dataset, ref.case_id), "-"),) if splits else ()
        rows.setdefault((ref.dataset, *case, *split, ref.layout, ref.modality or "?"), []).append(survey)
    names = ("dataset", *(["case"] if listed else []), *(["split"] if splits else []))
    columns = (*words(*names), *words("layout", drop=2), *words("modality", drop=1))
    columns = (*columns, *(() if listed else numbers("cases")), *numbers("shape", "spacing"), *words("labels", drop=3))
    lines = [(*key, *(() if listed else (len(group),)), *_describe(group)) for key, group in rows.items()]
    note = "Shapes are (slices or frames, y, x)."
    if not listed:
        note += f" {len(surveys)} cases: redirect the output to a file or a pipe to list each."
    if lines:
        print_table(Table("Cases", columns, tuple(lines), notes=(note,)), console)
    _print_texts(console, "note", "yellow", [(s, note) for s in surveys for note in s.notes])
    _print_texts(console, "failed", "red", [(s, s.error) for s in surveys if s.error])
    failed = sum(bool(s.error) for s in surveys)
    state = f"{failed} of them cannot be read" if failed else "all of them readable"
    console.print(f"{len(surveys)} cases, {state}.", highlight=False)


def _describe(surveys: Sequence[CaseSurvey]) -> tuple[str, str, str]:
    """Return shape, spacing and labels for a line of the table."""
    readable = [survey for survey in surveys if not survey.error]
    if not readable:
        return "failed", "", ""
    shapes, spacings = ({getattr(survey, name) for survey in readable} for name in ("shape", "spacing"))
    labels = dict.fromkeys(label for survey in readable for label in survey.labels.split(", "))
    texts = [values.pop() if len(values) == 1 else f"{len(values)} different" for values in (shapes, spacings)]
    return texts[0], texts[1], ", ".join(labels)


def _print_texts(console: Console, kind: str, style: str, texts: Sequence[tuple[CaseSurvey, str]]) -> None:
    """Print each text once, with the number of cases that share it."""
    cases: dict[str, list[str]] = {}
    for survey, text in texts:
        cases.setdefault(text, []).append(f"{survey.ref.dataset}/{survey.ref.case_id}")
    for text, names in cases.items():
        where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        console.print(f"{kind}: {where}: {text}", style=style, markup=False, highlight=False)
