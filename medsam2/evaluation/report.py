"""What an evaluation found, for people: tables on the terminal, Markdown, LaTeX, and one self-contained page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsam2.evaluation import tables
from medsam2.evaluation.overlays import Drawn
from medsam2.evaluation.settings import EvaluateSettings
from medsam2.evaluation.tables import LEAK, OUTSIDE, Table
from medsam2.files import atomic_write

if TYPE_CHECKING:
    import pandas as pd

WIDTH = 150  # of a table that does not go to a terminal
WORST = 10
SHOWN = 24  # pictures of a protocol on the page, spread over all; the others are files alone


@dataclass(frozen=True)
class Damage:
    """What corruptions cost under one protocol: the table, and its figure as PNG."""

    table: Table
    curves: bytes


@dataclass(frozen=True, eq=False)
class Report:
    """All that the written forms share.

    Attributes:
        summary: as summary.json. rows: one a checkpoint, protocol, corruption and object. first, worst: pictures.
        damage: by protocol, where there were corruptions.
    """

    summary: Mapping[str, Any]
    rows: pd.DataFrame
    settings: EvaluateSettings
    first: Sequence[Drawn] = ()
    worst: Sequence[Drawn] = ()
    damage: Mapping[str, Damage] = field(default_factory=dict)

    def clean(self, protocol: str) -> pd.DataFrame:
        """The uncorrupted rows of a protocol."""
        return self.rows[(self.rows["protocol"] == protocol) & (self.rows["corruption"] == "")]


def print_tables(report: Report) -> None:
    """One table a protocol on stdout, with what must be known to read them below."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for entry in report.summary["protocols"]:
        made = tables.to_rich(tables.score_table(report.summary, entry))
        made.title = f"{entry['protocol']['name']} on {report.summary['source']}"
        console.print(made)
    for damage in report.damage.values():
        console.print(tables.to_rich(damage.table))
    for line in notes(report):
        console.print(line, highlight=False, markup=False)
    for line in said(report.summary):
        console.print(line, style="red", highlight=False, markup=False)


def notes(report: Report) -> list[str]:
    """What must be known to read the tables."""
    summary = report.summary
    metrics, bootstrap = summary["metrics"], summary["bootstrap"]
    kinds = set(report.rows["kind"])
    limits = [f"{metrics['nsd_mm']:g} mm (volumes)"] if "volume" in kinds else []
    limits += [f"{metrics['nsd_px']:g} px (clips and stills)"] if kinds - {"volume"} else []
    limits += [f"{name} {value:g}" for name, value in metrics["tolerances"].items()]
    grid = "the shards' stored grid" if summary["grid"] == "stored" else "the native grid"
    return [
        f"Whole cases on {grid}, empty slices included; means over patients. NSD tolerance: {', '.join(limits)}.",
        "empty: of the frames without the object, the share predicted empty.",
        f"Intervals: bootstrap over patients (BCa, {bootstrap['resamples']} resamples, seed {bootstrap['seed']}); "
        "none with fewer than three patients.",
    ]


def warnings(summary: Mapping[str, Any]) -> list[str]:
    """What makes the numbers less than they seem."""
    lines = []
    if summary["failed"]:
        found = f"{summary['failed']} of {summary['cases']} cases failed and are not in the tables"
        lines.append(f"{found}; failures.csv says why.")
    for label, count in summary["leaks"].items():
        if count:
            lines.append(f"Leak: {label} was trained on {count} of these cases{LEAK}; its scores are not held out.")
    return lines


def marks(entry: Mapping[str, Any]) -> list[str]:
    """Why checkpoints are marked as outside of what they were trained for."""
    return [f"{label}{OUTSIDE}: {why}" for label, why in entry["outside"].items()]


def said(summary: Mapping[str, Any]) -> list[str]:
    """All warnings, and the marks of all protocols."""
    return [*warnings(summary), *(mark for entry in summary["protocols"] for mark in marks(entry))]


# ------------------------------------------------------------------------------------------ Markdown and LaTeX


def all_tables(report: Report) -> Iterator[tuple[str, Table]]:
    """Every table with a short name, in order."""
    summary = report.summary
    several = len(summary["protocols"]) > 1
    for entry in summary["protocols"]:
        name = entry["protocol"]["name"]
        yield f"scores-{name}" if several else "scores", tables.score_table(summary, entry)
        yield f"all-{name}" if several else "all", tables.metric_table(summary, entry)
        if (sizes := tables.size_table(summary, entry)) is not None:
            yield f"sizes-{name}" if several else "sizes", sizes
        if entry["comparisons"]:
            yield f"differences-{name}" if several else "differences", tables.comparison_table(entry)
        if name in report.damage:
            yield f"robustness-{name}" if several else "robustness", report.damage[name].table
    yield "checkpoints", tables.checkpoint_table(summary)
    yield "speed", tables.speed_table(summary)
    if summary["failures"]:
        yield "failures", tables.failure_table(summary)


def write_markdown(path: Path, report: Report) -> None:
    """summary.md: every table, after the notes and warnings."""
    warned = (f"**{line}**\n" for line in said(report.summary))
    lines = [f"# {title(report.summary)}", "", lead(report.summary), "", *warned]
    lines += [*(f"{note}  " for note in notes(report)), ""]
    lines += [tables.to_markdown(table) for _, table in all_tables(report)]
    with atomic_write(path, "w") as file:
        file.write("\n".join(lines))


def write_latex(path: Path, report: Report) -> None:
    """summary.tex: every table, to be read with \\input; needs the package booktabs."""
    lines = ["% \\usepackage{booktabs}"]
    lines += [f"% {line}" for line in [*said(report.summary), *notes(report)]]
    lines += [tables.to_latex(table, name) for name, table in all_tables(report)]
    with atomic_write(path, "w") as file:
        file.write("\n".join(lines))


def title(summary: Mapping[str, Any]) -> str:
    """The checkpoints."""
    return " → ".join(summary["checkpoints"])


def lead(summary: Mapping[str, Any]) -> str:
    """What was evaluated."""
    names = ", ".join(entry["protocol"]["name"] for entry in summary["protocols"])
    split = f", split {summary['split']}" if summary["split"] else ""
    scored = summary["cases"] - summary["failed"]
    return f"{names} on {summary['source']}{split}: {scored} of {summary['cases']} cases."


# ---------------------------------------------------------------------------------------------------- the page


def write_page(path: Path, report: Report) -> None:
    """report.html: everything in one file, pictures inside."""
    from jinja2 import Environment

    from medsam2.evaluation.page_template import TEMPLATE

    summary = report.summary
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    content = environment.from_string(TEMPLATE).render(
        title=title(summary),
        lead=" ".join([lead(summary), *notes(report)]),
        warnings=warnings(summary),
        sections=[_section(report, entry) for entry in summary["protocols"]],
        last=summary["checkpoints"][-1],
        checkpoints=tables.checkpoint_table(summary),
        speed=tables.speed_table(summary),
        failures=tables.failure_table(summary) if summary["failures"] else None,
        settings=report.settings.model_dump_json(indent=2),
    )
    with atomic_write(path, "w") as file:
        file.write(content)


def _section(report: Report, entry: Mapping[str, Any]) -> dict[str, Any]:
    from medsam2.evaluation.plots import draw_boxes, to_svg

    summary, name = report.summary, entry["protocol"]["name"]
    rows, damage = report.clean(name), report.damage.get(name)
    first = [drawn for drawn in report.first if drawn.row["protocol"] == name]
    return {
        "name": name,
        "citation": entry["protocol"]["citation"],
        "marks": marks(entry),
        "scores": tables.score_table(summary, entry),
        "metrics": tables.metric_table(summary, entry),
        "sizes": tables.size_table(summary, entry),
        "comparisons": tables.comparison_table(entry) if entry["comparisons"] else None,
        "robustness": damage.table if damage else None,
        "curves": base64.b64encode(damage.curves).decode() if damage else "",
        "boxes": base64.b64encode(to_svg(draw_boxes(rows, summary["checkpoints"]))).decode(),
        "pictures": [_embedded(drawn) for drawn in spread(first, SHOWN)],
        "more": len(first) > SHOWN,
        "worst": tables.worst_table(rows, summary["checkpoints"][-1], WORST),
        "worst_pictures": [_embedded(drawn) for drawn in report.worst if drawn.row["protocol"] == name],
    }


def spread(pictures: Sequence[Any], most: int) -> Sequence[Any]:
    """At most so many of the pictures, evenly spread over them.

    >>> spread("abcdefg", 3), spread("ab", 3)
    ('adg', 'ab')
    """
    return pictures[:: max(-(-len(pictures) // most), 1)]


def _embedded(drawn: Drawn) -> dict[str, str]:
    row = drawn.row
    scores = ", ".join(f"{label} DSC {score:.3f}" for label, score in drawn.scores.items())
    alt = f"{row['modality']} {row['structure']}, {row['dataset']}, case {row['case'][:8]}: {scores}"
    return {"data": _webp(drawn.path), "alt": alt}


def _webp(path: Path) -> str:
    """The picture in base64 as WebP, a tenth of the PNG, so that a page with hundreds of them still opens."""
    from PIL import Image

    content = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(content, "WEBP", quality=75)
    return base64.b64encode(content.getvalue()).decode()
