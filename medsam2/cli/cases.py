"""The table of raw cases, which `medsam2 inspect` and `medsam2 prepare --dry-run` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from medsam2.shards.inspect import CaseSurvey

MAX_CASES_LISTED = 40  # on a terminal; more are counted by dataset


def print_surveys(surveys: Sequence[CaseSurvey], splits: Mapping[tuple[str, str], str] | None = None) -> None:
    """A line a case, or a line a dataset on a terminal that would be flooded; then what is odd or wrong with them."""
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
        note += f" {len(surveys)} cases: send the output to a file or a pipe to have each in a line."
    if lines:
        print_table(Table("Cases", columns, tuple(lines), notes=(note,)), console)
    _print_texts(console, "note", "yellow", [(s, note) for s in surveys for note in s.notes])
    _print_texts(console, "failed", "red", [(s, s.error) for s in surveys if s.error])
    failed = sum(bool(s.error) for s in surveys)
    state = f"{failed} of them cannot be read" if failed else "all of them readable"
    console.print(f"{len(surveys)} cases, {state}.", highlight=False)


def _describe(surveys: Sequence[CaseSurvey]) -> tuple[str, str, str]:
    """Shape, spacing and labels of a line."""
    good = [survey for survey in surveys if not survey.error]
    if not good:
        return "failed", "", ""
    shapes, spacings = ({getattr(survey, name) for survey in good} for name in ("shape", "spacing"))
    labels = dict.fromkeys(label for survey in good for label in survey.labels.split(", "))
    texts = [values.pop() if len(values) == 1 else f"{len(values)} different" for values in (shapes, spacings)]
    return texts[0], texts[1], ", ".join(labels)


def _print_texts(console: Console, what: str, style: str, texts: Sequence[tuple[CaseSurvey, str]]) -> None:
    """A line a text: what is true of many cases is said once."""
    cases: dict[str, list[str]] = {}
    for survey, text in texts:
        cases.setdefault(text, []).append(f"{survey.ref.dataset}/{survey.ref.case_id}")
    for text, names in cases.items():
        where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        console.print(f"{what}: {where}: {text}", style=style, markup=False, highlight=False)
