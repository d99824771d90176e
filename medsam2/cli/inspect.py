"""`medsam2 inspect`: what raw data or shards hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medsam2.errors import UserError, explain_errors

if TYPE_CHECKING:
    from medsam2.cases.layouts.registry import CaseRef
    from medsam2.shards.inspect import CaseSurvey


@explain_errors
def inspect(
    path: Annotated[Path, typer.Argument(help="Raw data (a folder or one npz file), or a folder of shards.")],
    html: Annotated[Path | None, typer.Option(help="Also write one self-contained page with pictures.")] = None,
    layout: Annotated[str | None, typer.Option(help="Of raw data, where it is not recognised.")] = None,
    modality: Annotated[str | None, typer.Option(help="Of raw data, where it does not say.")] = None,
) -> None:
    """Show what raw data or shards hold, and what is wrong with them.

    Examples:

      medsam2 inspect data/

      medsam2 inspect shards/ --html shards.html
    """
    from medsam2.shards.index import ARROW

    shards = (path / ARROW).is_file()
    problems = _inspect_shards(path, html) if shards else _inspect_raw(path, html, layout, modality)
    if problems:
        raise typer.Exit(1)


def _inspect_shards(path: Path, html: Path | None) -> int:
    from rich.table import Table

    from medsam2.cli.console import wide_console
    from medsam2.shards.index import read_index
    from medsam2.shards.inspect import check_shards, structure_table

    index = read_index(path)
    table = Table("dataset", "split", "modality", "structure")
    for name in ("patients", "cases", "objects", "frames", "median pixels"):
        table.add_column(name, justify="right")
    for entry in structure_table(index):
        names = (entry.dataset, entry.split, entry.modality, entry.structure)
        numbers = (entry.patients, entry.cases, entry.objects, entry.frames, f"{entry.median_pixels:.0f}")
        table.add_row(*names, *map(str, numbers))
    console = wide_console()
    console.print(table)
    problems = check_shards(index)
    for problem in problems:
        console.print(f"problem: {problem}", style="red", markup=False, highlight=False)
    if not problems:
        console.print(f"{len(index)} segments; every shard has the size that index.json states.")
    if html:
        from medsam2.shards.page import shards_page

        _write_page(html, shards_page(index, problems))
    return len(problems)


def _inspect_raw(path: Path, html: Path | None, layout: str | None, modality: str | None) -> int:
    from medsam2.cases.layouts import find_cases

    refs = find_cases(path, layout, modality)
    surveys = print_cases(refs)
    if html:
        from medsam2.shards.page import cases_page

        _write_page(html, cases_page(refs, surveys))
    return sum(bool(s.error) for s in surveys)


def print_cases(refs: Sequence[CaseRef], splits: dict[tuple[str, str], str] | None = None) -> list[CaseSurvey]:
    """Read every case and print a table of them, with the first error of each; returns the surveys."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from medsam2.cli.console import wide_console
    from medsam2.shards.inspect import survey_case

    stderr = Console(stderr=True)
    surveys = [survey_case(ref) for ref in track(refs, "reading", console=stderr, transient=True)]
    table = Table("dataset", "case", *(["split"] if splits else []), "layout", "modality", "shape", "spacing", "labels")
    for survey in surveys:
        ref = survey.ref
        split = [splits.get((ref.dataset, ref.case_id), "-")] if splits else []
        shown = ["", "", "[red]failed[/red]"] if survey.error else [survey.shape, survey.spacing, survey.labels]
        table.add_row(ref.dataset, ref.case_id, *split, ref.layout, ref.modality or "?", *shown)
    console = wide_console()
    console.print(table)
    for survey in surveys:
        where = f"{survey.ref.dataset}/{survey.ref.case_id}"
        for note in survey.notes:
            console.print(f"note: {where}: {note}", style="yellow", markup=False, highlight=False)
        if survey.error:
            console.print(f"failed: {where}: {survey.error}", style="red", markup=False, highlight=False)
    failed = sum(bool(s.error) for s in surveys)
    console.print(f"{len(surveys)} cases, {failed} of them cannot be read.", highlight=False)
    return surveys


def _write_page(path: Path, content: str) -> None:
    from medsam2.files import atomic_write

    if path.exists():
        raise UserError(f"{path} already exists; choose another file or remove it first.")
    with atomic_write(path, "w") as file:
        file.write(content)
    print(f"page: {path}")
