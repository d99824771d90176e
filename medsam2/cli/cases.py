"""The table of raw cases, which `medsam2 inspect` and `medsam2 prepare --dry-run` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medsam2.shards.inspect import CaseSurvey


def print_surveys(surveys: Sequence[CaseSurvey], splits: Mapping[tuple[str, str], str] | None = None) -> None:
    """A line a case, then notes and the first error of each."""
    from rich.table import Table

    from medsam2.cli.console import wide_console

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
