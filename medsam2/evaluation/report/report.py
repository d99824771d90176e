"""Presents an evaluation: tables on the terminal, as Markdown and LaTeX, and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsam2.evaluation.report import tables
from medsam2.evaluation.report.overlays import SINGLE_FRAME_SIDE_PX, DrawnPicture
from medsam2.evaluation.report.tables import LEAK, OUTSIDE
from medsam2.evaluation.settings import EvaluateSettings
from medsam2.files import write_text
from medsam2.reporting.curves import Diagram, Line, draw_diagrams, to_png
from medsam2.reporting.overlays import encode
from medsam2.reporting.page import Block, Code, Folded, Gallery, Heading, Note, Page, Picture, Section, write_page
from medsam2.reporting.style import prediction_colour
from medsam2.reporting.tables import print_table, to_latex, to_markdown

if TYPE_CHECKING:
    import pandas as pd

MAX_PAGE_PICTURES = 24  # per protocol, spread over all of them; the others are only files
PAGE_WIDTH_PX = 1000  # CSS pixels; wider galleries wrap
CORRUPTION_COLUMNS, CORRUPTION_SIZE_INCHES = 5, (2.5, 2.0)  # number of diagrams per row, size of a diagram


@dataclass(frozen=True, eq=False)
class Report:
    """The results of an evaluation.

    Attributes:
        summary: the content of summary.json. rows: one per checkpoint, protocol, corruption and object.
        first, worst: pictures of the first objects of each group, and of the lowest scores.
    """

    summary: Mapping[str, Any]
    rows: pd.DataFrame
    settings: EvaluateSettings
    first: Sequence[DrawnPicture] = ()
    worst: Sequence[DrawnPicture] = ()


def print_tables(report: Report) -> None:
    """Print the scores of each protocol to stdout, followed by notes and warnings."""
    from rich.console import Console

    console = Console()
    console.print(subtitle(report.summary), highlight=False, markup=False)
    for name, table in tables.all_tables(report.summary):
        if name.startswith(("scores", "robustness")):
            print_table(table, console)
    for line in notes(report):
        console.print(line, highlight=False, markup=False)
    for line in all_warnings(report.summary):
        console.print(line, style="red", highlight=False, markup=False)
    print(f"All tables and pictures: {report.settings.output}/report.html")


def notes(report: Report) -> list[str]:
    """Notes on how to read the tables: grid, averages, tolerances, intervals."""
    summary = report.summary
    metrics, bootstrap = summary["metrics"], summary["bootstrap"]
    kinds = set(report.rows["kind"])
    limits = [f"{metrics['nsd_mm']:g} mm (volumes)"] if "volume" in kinds else []
    limits += [f"{metrics['nsd_px']:g} px (clips and stills)"] if kinds - {"volume"} else []
    limits += [f"{name} {value:g}" for name, value in metrics["tolerances"].items()]
    grid = "the shards' stored grid" if summary["grid"] == "stored" else "the native grid"
    return [
        f"Whole cases on {grid}, including empty slices; means over patients. NSD tolerance: {', '.join(limits)}.",
        "empty: share of the frames without the object that are predicted empty.",
        f"Intervals: bootstrap over patients (BCa, {bootstrap['resamples']} resamples, seed {bootstrap['seed']}); "
        "none with fewer than three patients.",
    ]


def score_warnings(summary: Mapping[str, Any]) -> list[str]:
    """Warnings about failed cases and leaks, which limit what the scores show."""
    lines = []
    if summary["failed"]:
        failed = f"{summary['failed']} of {summary['cases']} cases failed and are not in the tables"
        lines.append(f"{failed}; failures.csv says why.")
    for label, count in summary["leaks"].items():
        if count:
            lines.append(f"Leak: {label} was trained on {count} of these cases{LEAK}; its scores are not held out.")
    return lines


def prompt_warnings(entry: Mapping[str, Any]) -> list[str]:
    """Warnings about checkpoints that were not trained with the prompts of a protocol."""
    return [f"{label}{OUTSIDE}: {why}" for label, why in entry["outside"].items()]


def all_warnings(summary: Mapping[str, Any]) -> list[str]:
    """All warnings, those about prompts from all protocols."""
    return [*score_warnings(summary), *(line for entry in summary["protocols"] for line in prompt_warnings(entry))]


def write_pages(output: Path, report: Report) -> None:
    """Write summary.md and summary.tex (warnings, notes and every table) and report.html.

    summary.tex is for \\input and needs the package booktabs.
    """
    warnings = (f"**{line}**\n" for line in all_warnings(report.summary))
    lines = [f"# {title(report.summary)}", "", subtitle(report.summary), "", *warnings]
    lines += [*(f"{note}  " for note in notes(report)), ""]
    lines += [to_markdown(table) for _, table in tables.all_tables(report.summary)]
    write_text(output / "summary.md", "\n".join(lines))
    comments = [subtitle(report.summary), *all_warnings(report.summary), *notes(report)]
    lines = ["% \\usepackage{booktabs}", *(f"% {line}" for line in comments)]
    lines += [to_latex(table, name) for name, table in tables.all_tables(report.summary)]
    write_text(output / "summary.tex", "\n".join(lines))
    _write_html(output / "report.html", report)


def title(summary: Mapping[str, Any]) -> str:
    """The title: the checkpoints in order."""
    return " → ".join(summary["checkpoints"])


def subtitle(summary: Mapping[str, Any]) -> str:
    """Protocols, source and number of cases: "... 57 of 57 cases.", or "... 6 of 57 (limit=6)." with a limit."""
    names = ", ".join(entry["protocol"]["name"] for entry in summary["protocols"])
    split = f", split {summary['split']}" if summary["split"] else ""
    scored = summary["cases"] - summary["failed"]
    if summary["cases"] < summary["available"]:
        cases = f"{scored} of {summary['available']} (limit={summary['limit']})"
    else:
        cases = f"{scored} of {summary['cases']} cases"
    return f"{names} on {summary['source']}{split}: {cases}."


# ---------------------------------------------------------------------------------------------------- the page


def _write_html(path: Path, report: Report) -> None:
    """Write everything to one file with embedded pictures."""
    summary = report.summary
    sections = [Section("", tuple(Note(line, "warning") for line in score_warnings(summary)))]
    for entry in summary["protocols"]:
        sections.append(Section(entry["protocol"]["name"], tuple(_protocol_blocks(report, entry))))
    sections.append(
        Section("Checkpoints, speed and memory", (tables.checkpoint_table(summary), tables.speed_table(summary)))
    )
    if summary["failures"]:
        sections.append(Section(f"Failures ({len(summary['failures'])})", (tables.failure_table(summary),)))
    sections.append(Section("Settings", (Folded("settings.json", (Code(report.settings.model_dump_json(indent=2)),)),)))
    write_page(path, Page(title(summary), " ".join([subtitle(summary), *notes(report)]), sections))


def _protocol_blocks(report: Report, entry: Mapping[str, Any]) -> Iterator[Block]:
    name, labels = entry["protocol"]["name"], report.summary["checkpoints"]
    rows = report.rows[(report.rows["protocol"] == name) & (report.rows["corruption"] == "")]
    if entry["protocol"]["citation"]:
        yield Note(entry["protocol"]["citation"])
    yield from (Note(line, "mark") for line in prompt_warnings(entry))
    for kind, table in tables.protocol_tables(report.summary, entry):
        if kind == "robustness":
            alt = "DSC against the severity of each corruption"
            yield Picture(draw_robustness(entry["robustness"]), kind="png", alt=alt)
        yield Folded("All scores", (table,)) if kind == "all" else table
    first = [drawn for drawn in report.first if drawn.row["protocol"] == name]
    width = SINGLE_FRAME_SIDE_PX if (rows["kind"] == "still").all() else PAGE_WIDTH_PX
    if first:
        more = f" Some of them; all are in overlays/{name}/." if len(first) > MAX_PAGE_PICTURES else ""
        yield Heading("Pictures")
        yield Note(f"The number in a corner is the DSC of that slice.{more}")
        yield Gallery(tuple(map(_embed, first[:: -(-len(first) // MAX_PAGE_PICTURES)])), width)
    if worst := tuple(_embed(drawn) for drawn in report.worst if drawn.row["protocol"] == name):
        yield Heading(f"Lowest DSC of {labels[-1]}")
        yield Gallery(worst, width)


def _embed(drawn: DrawnPicture) -> Picture:
    """Encode the picture as WebP, a tenth of the PNG's size, so that a page with hundreds of them opens fast."""
    from PIL import Image

    row = drawn.row
    scores = ", ".join(f"{label} DSC {score:.3f}" for label, score in drawn.scores.items())
    caption = f"{row['modality']} {row['structure']}, {row['dataset']}, case {row['case'][:8]}: {scores}"
    with Image.open(drawn.file) as picture:
        return Picture(encode(picture, quality=75), caption)


def draw_robustness(parts: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw PNG curves: one diagram per corruption, DSC over severity (0: clean), one line per checkpoint."""
    diagrams = []
    for part in parts:
        severities = [0, *part["severities"]]
        lines = tuple(
            Line(label, severities, [clean, *part["dsc"][label]], prediction_colour(place))
            for place, (label, clean) in enumerate(part["clean"].items())
        )
        name = tables.corruption_title(part)
        diagrams.append(Diagram(name, lines, markers=True, limits=(0, 1.02), x_label="severity", y_label="DSC"))
    return to_png(draw_diagrams(diagrams, CORRUPTION_COLUMNS, CORRUPTION_SIZE_INCHES, shared_legend=True))
