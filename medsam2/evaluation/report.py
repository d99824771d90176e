"""What an evaluation found, for people: one table on the terminal and one self-contained page."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsam2.evaluation.overlays import Drawn
from medsam2.evaluation.settings import EvaluateSettings
from medsam2.evaluation.summary import TOTAL
from medsam2.files import atomic_write

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

WIDTH = 150  # of a table that does not go to a terminal
WORST = 10


def print_table(summary: dict[str, Any], rows: pd.DataFrame) -> None:
    """One table on stdout, with what must be known to read it below."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(make_table(summary))
    for line in notes(summary, rows):
        console.print(line, highlight=False)


def make_table(summary: dict[str, Any]) -> Table:
    """Data set (if a modality has several), modality, structure; DSC and NSD of each checkpoint; the change in DSC."""
    from rich.table import Table

    labels, groups = summary["checkpoints"], summary["groups"]
    header, lines = table_cells(summary)
    table = Table(title=f"{summary['protocol']['name']} on {summary['source']}", title_justify="left")
    texts = header.index("cases")
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < texts else "right", no_wrap=place >= texts)
    for group, cells, following in zip(groups, lines, [*groups[1:], None], strict=True):
        total = group["structure"] == TOTAL
        ends = following is None or (following["structure"] == TOTAL) != total
        table.add_row(*cells, style="bold" if total else None, end_section=ends)
    if any(summary["leaks"][label] for label in labels):
        table.caption = "leak: some of these cases were trained on"
        table.caption_style = "red"
    return table


def table_cells(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table as text: its header, and one list of cells a group."""
    labels, groups = summary["checkpoints"], summary["groups"]
    pairs = {(g["dataset"], g["modality"]) for g in groups if TOTAL not in (g["dataset"], g["modality"])}
    several = len(pairs) > len({modality for _, modality in pairs})  # else the modality says it
    leaks = any(summary["leaks"].values())
    header = [*(["data set"] if several else []), "modality", "structure", "cases", "patients"]
    header += [f"DSC\n{label}" for label in labels]
    header += ["change in DSC\n[95 %]"] if len(labels) > 1 else []
    header += [f"NSD\n{label}" for label in labels] + [f"empty\n{label}" for label in labels]
    header += ["leak"] if leaks else []
    lines = []
    for group in groups:
        cells = [group["dataset"]] if several else []
        cells += [group["modality"], group["structure"], str(group["cases"]), str(group["patients"])]
        cells += [_score(group["dsc"][label]) for label in labels]
        cells += [change_text(group["dsc_change"])] if len(labels) > 1 else []
        cells += [_score(group[name][label]) for name in ("nsd", "absent_empty") for label in labels]
        lines.append(cells + ([str(group["leaks"])] if leaks else []))
    return header, lines


def change_text(change: dict[str, Any] | None) -> str:
    """'+0.412 [+0.380, +0.441]', without brackets where there are too few patients for an interval."""
    if change is None or change["mean"] is None:
        return "-"
    text = f"{change['mean']:+.3f}"
    return text if change["low"] is None else f"{text} [{change['low']:+.3f}, {change['high']:+.3f}]"


def notes(summary: dict[str, Any], rows: pd.DataFrame) -> list[str]:
    """What must be known to read the table."""
    bootstrap, tolerance = summary["bootstrap"], summary["tolerance"]
    kinds = set(rows["kind"])
    limits = [f"{tolerance['mm']:g} mm (volumes)"] if "volume" in kinds else []
    limits += [f"{tolerance['px']:g} px (clips and stills)"] if kinds - {"volume"} else []
    grid = "the shards' stored grid" if summary["grid"] == "stored" else "the native grid"
    lines = [
        f"Whole cases on {grid}, empty slices included; means over patients. NSD tolerance: {', '.join(limits)}.",
        "empty: of the frames without the object, the share predicted empty.",
    ]
    if len(summary["checkpoints"]) > 1:
        lines.append(
            f"Interval: bootstrap over patients (BCa, {bootstrap['resamples']} resamples, seed {bootstrap['seed']}); "
            "none with fewer than three patients."
        )
    if summary["failed"]:
        lines.append(f"[red]{summary['failed']} cases could not be read and are not in the table.[/red]")
    for label, count in summary["leaks"].items():
        if count:
            text = f"Leak: {label} was trained on {count} of these cases; its scores are not held out."
            lines.append(f"[red]{text}[/red]")
    return lines


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# ---------------------------------------------------------------------------------------------------- the page


def write_page(
    path: Path, summary: dict[str, Any], rows: pd.DataFrame, pictures: list[Drawn], settings: EvaluateSettings
) -> None:
    """report.html: the table, the worst cases, the pictures (inside the file), and the settings."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    header, lines = table_cells(summary)
    last = summary["checkpoints"][-1]
    worst = rows[rows["checkpoint"] == last].sort_values("dsc").head(WORST)
    content = environment.from_string(PAGE).render(
        summary=summary,
        header=header,
        lines=list(zip(lines, [group["structure"] == TOTAL for group in summary["groups"]], strict=True)),
        texts=header.index("cases"),
        notes=[line.replace("[red]", "").replace("[/red]", "") for line in notes(summary, rows)],
        last=last,
        worst=worst.to_dict("records"),
        pictures=[
            {
                "data": _jpeg(drawn.path),
                "alt": f"{drawn.row.modality} {drawn.row.structure}, case {drawn.row.case[:8]}: "
                + ", ".join(f"{label} DSC {score:.3f}" for label, score in drawn.scores.items()),
            }
            for drawn in pictures
        ],
        settings=settings.model_dump_json(indent=2),
    )
    with atomic_write(path, "w") as file:
        file.write(content)


def _jpeg(path: Path) -> str:
    """The picture in base64 as JPEG, a fifth of the PNG, so that a page with a hundred of them still opens."""
    from PIL import Image

    content = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(content, "JPEG", quality=85)
    return base64.b64encode(content.getvalue()).decode()


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ summary.protocol.name }}: {{ summary.checkpoints | join(", ") }}</title>
<style>
:root { color-scheme: dark; }
body { background: #0b0f14; color: #e6edf3; font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1280px;
       padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
p { color: #8b98a5; margin: .25rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #21262d; padding: .35rem .8rem; text-align: right; white-space: nowrap; }
th { white-space: pre-line; }
th { color: #8b98a5; font-weight: 600; } .text { text-align: left; }
tr.total td { font-weight: 700; }
img { display: block; margin: 0 0 1rem; max-width: 100%; border: 1px solid #21262d; border-radius: 6px; }
pre { background: #11161d; border-radius: 6px; overflow-x: auto; padding: 1rem; color: #8b98a5; }
</style>
</head>
<body>
<h1>{{ summary.checkpoints | join(" → ") }}</h1>
<p>{{ summary.protocol.name }} on {{ summary.source }}{% if summary.split %}, split {{ summary.split }}{% endif %}</p>
{% if summary.protocol.citation %}<p>{{ summary.protocol.citation }}</p>{% endif %}

<h2>Scores</h2>
<div class="wide"><table>
<tr>{% for name in header %}<th{% if loop.index0 < texts %} class="text"{% endif %}>{{ name }}</th>{% endfor %}</tr>
{% for cells, total in lines %}
<tr{% if total %} class="total"{% endif %}>
{% for cell in cells %}<td{% if loop.index0 < texts %} class="text"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% for note in notes %}<p>{{ note }}</p>{% endfor %}

<h2>Pictures</h2>
<p>The number in a corner is the DSC of that slice.</p>
{% for picture in pictures %}
<img alt="{{ picture.alt }}" src="data:image/jpeg;base64,{{ picture.data }}">
{% else %}
<p>None were asked for.</p>
{% endfor %}

<h2>Lowest DSC of {{ last }}</h2>
<div class="wide"><table>
<tr><th class="text">modality</th><th class="text">structure</th><th class="text">data set</th>
<th class="text">case</th><th>DSC</th><th>NSD</th><th>prompted slice</th><th>DSC elsewhere</th></tr>
{% for row in worst %}
<tr><td class="text">{{ row.modality }}</td><td class="text">{{ row.structure }}</td>
<td class="text">{{ row.dataset }}</td><td class="text">{{ row.case }}</td><td>{{ "%.3f" | format(row.dsc) }}</td>
<td>{{ "%.3f" | format(row.nsd) }}</td><td>{{ row.prompt_frames }} ({{ "%.3f" | format(row.prompt_dsc) }})</td>
<td>{{ "%.3f" | format(row.other_dsc) }}</td></tr>
{% endfor %}
</table></div>

<h2>Settings</h2>
<pre>{{ settings }}</pre>
</body>
</html>
"""
