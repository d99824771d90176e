"""One self-contained HTML page about raw data or shards: tables, problems and pictures with outlines.

Names of cases and patients stay off the page (FAULTS 25b): raw cases are numbered, shards have salted ids.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from medsam2.cases.case import CaseError
from medsam2.cases.intensity import to_uint8
from medsam2.cases.layouts.registry import CaseRef
from medsam2.errors import UserError
from medsam2.shards.index import JSON, SegmentIndex
from medsam2.shards.inspect import CaseSurvey, structure_table
from medsam2.shards.load import load_segment

PICTURES = 24
SIDE = 256
COLOURS = ((255, 80, 80), (80, 220, 100), (90, 150, 255), (255, 210, 60), (230, 110, 240), (80, 230, 230))

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1150px; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; }
th { text-align: left; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
.sheet { display: flex; flex-wrap: wrap; gap: 12px; } figure { margin: 0; width: 200px; }
figure img { width: 200px; border-radius: 4px; background: #000; } figcaption { font-size: 12px; color: #555; }
.bad { color: #b00020; }
</style></head><body>
<h1>{{ title }}</h1>
<p>{{ lead }}</p>
{% for problem in problems %}<p class="bad">{{ problem }}</p>{% endfor %}
<table><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td{% if cell is number %} class="n"{% endif %}>{{ cell }}</td>
{% endfor %}</tr>{% endfor %}</table>
<div class="sheet">{% for picture in pictures %}
<figure><img src="data:image/png;base64,{{ picture.data }}" alt="{{ picture.text }}">
<figcaption>{{ picture.text }}</figcaption></figure>{% endfor %}</div>
</body></html>
"""


@dataclass(frozen=True)
class Picture:
    """A thumbnail as base64 PNG with its caption."""

    data: str
    text: str


def shards_page(index: SegmentIndex, problems: Sequence[str]) -> str:
    """The page of a folder of shards: structures, problems, and up to 24 segments spread over the index."""
    rows = [
        (e.dataset, e.split, e.modality, e.structure, e.patients, e.cases, e.objects, e.frames, round(e.median_pixels))
        for e in structure_table(index)
    ]
    columns = ("data set", "split", "modality", "structure", "patients", "cases", "objects", "frames", "median pixels")
    pictures = []
    for number in _spread(len(index)):
        try:
            entry, image, planes = load_segment(index, number)
        except UserError:
            continue  # a damaged shard is among the problems already
        frame = _fullest(planes)
        names = ", ".join(dict.fromkeys(o.name for o in entry.objects))
        text = f"{entry.dataset} {entry.split}, {entry.modality}, frame {entry.frames[frame]}: {names}"
        pictures.append(Picture(thumbnail(image[frame], planes[:, frame]), text))
    lead = f"{len(index)} segments. {_configuration(index)}"
    return _render("Shards", lead, problems, columns, rows, pictures)


def cases_page(refs: Sequence[CaseRef], surveys: Sequence[CaseSurvey]) -> str:
    """The page of raw data: one line a case, numbered in the order of the terminal's table."""
    columns = ("data set", "case", "layout", "modality", "shape", "spacing", "labels")
    rows, pictures = [], []
    for number, survey in enumerate(surveys, start=1):
        shown = ("cannot be read", "", "") if survey.error else (survey.shape, survey.spacing, survey.labels)
        rows.append((survey.ref.dataset, number, survey.ref.layout, survey.ref.modality or "?", *shown))
    good = [n for n, survey in enumerate(surveys) if not survey.error]
    for number in (good[i] for i in _spread(len(good))):
        try:
            case = refs[number].load()
            image, window = to_uint8(case)
        except CaseError:
            continue  # it cannot be scaled; the table says what it is
        frame = _fullest(case.planes)
        text = f"{case.dataset} case {number + 1}, {case.modality}, slice {frame}, {window}"
        pictures.append(Picture(thumbnail(image[frame], case.planes[:, frame]), text))
    failed = len(surveys) - len(good)
    lead = f"{len(surveys)} cases, {failed} of them cannot be read. Cases are numbered as in the terminal's table."
    return _render("Raw data", lead, (), columns, rows, pictures)


def thumbnail(image: np.ndarray, planes: np.ndarray) -> str:
    """A frame uint8 [H, W(, 3)] with the outlines of planes [P, H, W], at most 256 px a side, as base64 PNG."""
    from PIL import Image
    from scipy.ndimage import binary_erosion

    factor = SIDE / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    picture = np.array(Image.fromarray(np.ascontiguousarray(image)).convert("RGB").resize(size))
    colour = 0
    for plane in planes:
        for value in np.unique(plane[plane > 0]):
            mask = np.array(Image.fromarray(plane == value).resize(size, Image.Resampling.NEAREST))
            picture[mask & ~binary_erosion(mask)] = COLOURS[colour % len(COLOURS)]
            colour += 1
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _spread(count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, PICTURES))}) if count else []


def _fullest(planes: np.ndarray) -> int:
    """The frame of planes [P, T, H, W] with the largest labelled area."""
    return int(np.argmax([np.count_nonzero(planes[:, t]) for t in range(planes.shape[1])]))


def _configuration(index: SegmentIndex) -> str:
    try:
        found = json.loads((index.folder / JSON).read_text())["configuration"]
    except (OSError, ValueError, KeyError):
        return ""
    return "Prepared with " + ", ".join(f"{key} {value}" for key, value in found.items() if value is not None) + "."


def _render(
    title: str,
    lead: str,
    problems: Iterable[str],
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    pictures: Sequence[Picture],
) -> str:
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(TEMPLATE)
    return template.render(title=title, lead=lead, problems=problems, columns=columns, rows=rows, pictures=pictures)
