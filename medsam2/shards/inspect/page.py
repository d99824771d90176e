"""The page of `medsam2 inspect --html` on raw data or shards: tables, diagrams, warnings and images with outlines.

The page has no names of cases and patients: raw cases are numbered, shards have salted ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from medsam2.cases.case import CaseError, CaseRef
from medsam2.cases.intensity import to_uint8
from medsam2.cases.layouts import load_case
from medsam2.errors import UserError
from medsam2.reporting.curves import add_legend, new_axes, to_svg
from medsam2.reporting.overlays import Frame, Outline, draw_frame, encode
from medsam2.reporting.page import Block, Code, Folded, Gallery, Note, Page, Picture, Section
from medsam2.reporting.style import OBJECTS, OTHERS, SERIES
from medsam2.reporting.tables import Table, numbers, words
from medsam2.shards.index import SegmentIndex
from medsam2.shards.inspect.checks import by_kind
from medsam2.shards.inspect.survey import CaseSurvey, ShardsReport
from medsam2.shards.inspect.tables import ShardTables, Track, no_track, spread
from medsam2.shards.load import load_frame

if TYPE_CHECKING:
    import pandas as pd

MAX_PICTURES = 24
MAX_FINDINGS = 5000  # per kind; browsers open longer pages slowly
MAX_OPEN_ROWS = 24  # longer tables are folded
MAX_WINDOWS = 3  # per line
DIAGRAM_WIDTH = 340  # CSS pixels
DIAGRAM_SIZE = (4.4, 2.9)  # inches
MAX_BARS = 30
LOG_AXIS_RATIO = 30.0  # largest over smallest value; above this, the axis is logarithmic
OTHER_SERIES = "others"
THUMBNAIL_SIDE = 320  # pixels
MAX_NAMES = 6  # structures in a caption


def shards_page(report: ShardsReport, track: Track = no_track) -> Page:
    """Make the page of a folder of shards."""
    # Pages are shared, so they do not show the path of the folder.
    problems = [Note(problem.replace(f"{report.index.folder}/", ""), "warning") for problem in report.problems]
    structures = report.structures
    about = "Objects of the segments, the frames that show them, and their median area there, in stored pixels."
    count = len(structures.rows)
    diagrams = charts(report.tables, report.histograms, report.histogram_note)
    note = () if report.histograms else (Note(report.histogram_note),)
    settings = preparation(report.summary)
    sections = (
        Section("Problems", tuple(problems)),
        Section("Overview", (report.overview,)),
        Section(f"Warnings ({len(report.findings):,})", _warnings(report)),
        Section("Structures", (Note(about), Folded(f"{count} rows", (structures,), open=count <= MAX_OPEN_ROWS))),
        Section("Datasets", (dataset_table(report),)),
        Section("Preparation", (Code(settings),) if settings else ()),
        Section("Distributions", (*note, Gallery(tuple(diagrams), DIAGRAM_WIDTH))),
        Section("Pictures", _shard_pictures(report, track)),
    )
    return Page("Shards", _lead(report), sections)


def cases_page(refs: Sequence[CaseRef], surveys: Sequence[CaseSurvey], track: Track = no_track) -> Page:
    """Make the page of raw data: one row per case, numbered in the order of the table on the terminal."""
    rows: list[tuple[str | int, ...]] = []
    for number, survey in enumerate(surveys, start=1):
        cells = ("cannot be read", "", "") if survey.error else (survey.shape, survey.spacing, survey.labels)
        # Notes and errors may contain file names, so the page shows their number only.
        rows.append((survey.ref.dataset, number, survey.ref.layout, survey.ref.modality or "?", *cells,
                     len(survey.notes)))  # fmt: skip
    columns = words("layout", "modality", "shape", "spacing", "labels")
    table = Table("", (*words("dataset"), *numbers("case"), *columns, *numbers("notes")), tuple(rows))
    readable = [n for n, survey in enumerate(surveys) if not survey.error]
    shown = [readable[i] for i in spread([(refs[n].dataset, refs[n].modality) for n in readable], MAX_PICTURES)]
    pictures = [p for n in track(shown, "drawing") if (p := _case_picture(refs[n], n + 1))]
    about = f"{len(pictures)} of {len(readable)} cases: for each, the slice with the largest labelled area."
    lead = (
        f"{len(surveys)} cases; {len(surveys) - len(readable)} of them cannot be read. Cases are numbered in the order "
        "of the table on the terminal, which shows what is wrong with a case."
    )
    sections = (Section("Cases", (table,)), Section("Pictures", (Note(about), Gallery(tuple(pictures)))))
    return Page("Raw data", lead, sections)


def _warnings(report: ShardsReport) -> tuple[Block, ...]:
    """One table per kind, worst kind first."""
    blocks: list[Block] = []
    for kind, findings in by_kind(report.findings).items():
        rows = tuple((f.dataset, f.split, f.case, f.what, f.remedy) for f in findings[:MAX_FINDINGS])
        notes = (f"The first {MAX_FINDINGS:,} of {len(findings):,}.",) if len(findings) > MAX_FINDINGS else ()
        table = Table(kind, words("dataset", "split", "case", "problem", "remedy"), rows, notes=notes)
        blocks.append(Folded(f"{kind}: {len(findings):,}", (table,), open=len(findings) <= MAX_OPEN_ROWS))
    return tuple(blocks) or (Note("None."),)


def _shard_pictures(report: ShardsReport, track: Track) -> tuple[Block, ...]:
    """Draw up to 24 segments with objects, spread over (dataset, modality, split)."""
    segments = report.tables.segments
    labelled = segments[segments["objects"] > 0] if (segments["objects"] > 0).any() else segments
    groups = list(zip(labelled["dataset"], labelled["modality"], labelled["split"], strict=True))
    pictures, num_unreadable = [], 0
    for place in track(spread(groups, MAX_PICTURES), "drawing"):
        try:
            pictures.append(draw_segment(report.index, int(labelled.index[place])))
        except UserError:
            num_unreadable += 1  # a damaged shard is listed among the problems
    about = (
        f"{len(pictures)} of {len(segments):,} segments, spread over datasets, modalities and splits: for each, the "
        "frame that shows most of its objects." + (f" {num_unreadable} more cannot be read." if num_unreadable else "")
    )
    return Note(about), Gallery(tuple(pictures))


def _case_picture(ref: CaseRef, number: int) -> Picture | None:
    """Draw the slice of a raw case with the largest labelled area; None if it cannot be scaled."""
    try:
        case = load_case(ref)
        image, window = to_uint8(case)
    except CaseError:
        return None
    frame = int(np.argmax([np.count_nonzero(case.planes[:, t]) for t in range(case.planes.shape[1])]))
    text = f"{case.dataset} case {number}, {case.modality}, slice {frame}, {window}"
    names = {(label.plane, label.id): label.name for label in case.labels}
    return draw_labels(image[frame], case.planes[:, frame], names, text)


def dataset_table(report: ShardsReport) -> Table:
    """One row per (dataset, modality): the window of its intensities, and how frames are stored."""
    rows: list[tuple[str | int, ...]] = []
    for (dataset, modality), cases in report.tables.cases.groupby(["dataset", "modality"]):
        stored = ", ".join(sorted(cases["codec"].unique()))
        reduced = (cases["height"] < cases["original_h"]) | (cases["width"] < cases["original_w"])
        if reduced.any():
            stored += f"; {reduced.sum():,} cases reduced to {cases[['height', 'width']].max().max()} px"
        rows.append((dataset, modality, len(cases), _windows(cases["window"].unique().tolist()), stored))
    columns = (*words("dataset", "modality"), *numbers("cases"), *words("window", "stored as"))
    return Table("Intensities and frames as stored", columns, tuple(rows))


def preparation(summary: dict[str, Any]) -> str:
    """Sources of the datasets and options of `medsam2 prepare` from index.json, as yaml."""
    values = {name: summary.get(name) for name in ("configuration", "datasets", "failed_cases")}
    settings = {name: value for name, value in values.items() if value not in (None, "", [], {}, 0)}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip() if settings else ""


def _lead(report: ShardsReport) -> str:
    cases, segments = report.tables.cases, report.tables.segments
    patients = len(cases[["dataset", "patient"]].drop_duplicates())
    return (
        f"{patients:,} patients, {len(cases):,} cases, {len(segments):,} segments, {segments['frames'].sum():,} "
        f"frames and {len(report.tables.objects):,} objects in {segments['shard'].nunique():,} shards. "
        "Cases and patients have salted ids; their names are not in the shards."
    )


def _windows(windows: list[str]) -> str:
    """Name the windows of a dataset; windows that a rule computed per case are named by the rule."""
    names = windows if len(windows) == 1 else sorted({w.partition("(")[2].rstrip(")") or w for w in windows})
    return "; ".join([*names[:MAX_WINDOWS], f"{len(names) - MAX_WINDOWS} more"][: max(len(names), MAX_WINDOWS + 1)])


# --------------------------------------------------------------------------------------------- diagrams and pictures


def charts(tables: ShardTables, histograms: Mapping[int, np.ndarray], histogram_note: str = "") -> list[Picture]:
    """Draw all diagrams that have data; a series has the same colour in all of them.

    Args:
        histograms: counts of intensities in equal bins of uint8, by segment row.
    """
    column = "modality" if tables.cases["modality"].nunique() > 1 else "dataset"
    sizes = tables.cases[column].value_counts()
    names = {name: name if place < len(SERIES) else OTHER_SERIES for place, name in enumerate(sizes.index)}
    colours = dict(zip(sorted(sizes.index[: len(SERIES)]), SERIES, strict=False)) | {OTHER_SERIES: OTHERS}
    pictures = []
    if histograms:
        series = tables.segments[column].map(names)
        shares: dict[str, list[np.ndarray]] = {name: [] for name in colours}
        for row, histogram in histograms.items():
            shares[series[row]].append(np.asarray(histogram) / max(1, np.sum(histogram)))
        means = {name: np.mean(parts, axis=0) for name, parts in shares.items() if parts}
        pictures.append(Picture(draw_intensities(means, colours), histogram_note, "svg+xml", alt="Intensities"))
    for title, x_label, y_label, values, note in _distributions(tables, column, names):
        if any(len(part) for part in values.values()):
            content = draw_bars(title, x_label, y_label, values, colours)
            pictures.append(Picture(content, note, "svg+xml", alt=title))
    return pictures


def _distributions(
    tables: ShardTables, column: str, names: Mapping[str, str]
) -> list[tuple[str, str, str, dict[str, np.ndarray], str]]:
    """Spacing, size and length of cases; area and length of objects: (title, x label, y label, values, note)."""
    cases, objects = tables.cases, tables.case_objects
    series = cases[column].map(names)
    volumes, clips = cases[cases["kind"] == "volume"], cases[cases["kind"] == "clip"]
    # Readers give pixels of exactly 1 mm if a clip or a still does not state their size.
    unknown = (cases["kind"] != "volume") & (cases["spacing_y"] == 1) & (cases["spacing_x"] == 1)
    in_plane = np.sqrt(cases["spacing_y"] * cases["spacing_x"])[~unknown]
    left_out = f"Without {unknown.sum():,} clips and stills of unknown pixel size." if unknown.any() else ""
    areas, frames = (objects[name].set_axis(objects["case_number"]) for name in ("largest", "frames"))
    longest = cases[["original_h", "original_w"]].max(axis=1)
    return [
        ("Pixel size", "in-plane spacing, mm", "cases", _by(series, in_plane), left_out),
        ("Slice spacing", "slice spacing, mm", "volumes", _by(series, volumes["spacing_t"]), ""),
        ("Frame size", "longer side of the frame, pixels", "cases", _by(series, longest), ""),
        ("Volumes", "slices per volume", "volumes", _by(series, volumes["original_t"]), ""),
        ("Clips", "frames per clip", "clips", _by(series, clips["original_t"]), ""),
        ("Object area", "pixels of an object on its largest frame", "objects", _by(series, areas), ""),
        ("Frames with an object", "frames per case that show an object", "objects", _by(series, frames), ""),
    ]


def _by(series: pd.Series, values: pd.Series) -> dict[str, np.ndarray]:
    """Group the positive values by series; `values` are indexed by case number."""
    values = values[np.isfinite(values) & (values > 0)]
    return {name: group.to_numpy() for name, group in values.groupby(series.reindex(values.index).to_numpy())}


def draw_bars(
    title: str, x_label: str, y_label: str, series: Mapping[str, np.ndarray], colours: Mapping[str, str]
) -> bytes:
    """Draw a stacked histogram of positive values as SVG, on a logarithmic axis if they span decades."""
    from matplotlib.ticker import MaxNLocator

    values = np.concatenate(list(series.values()))
    low, high = float(values.min()), float(values.max())
    integer, logarithmic = bool(np.issubdtype(values.dtype, np.integer)), high / low > LOG_AXIS_RATIO
    edges = _bar_edges(low, high, integer, logarithmic)
    figure, axes = new_axes(title, x_label, y_label, DIAGRAM_SIZE)
    bar_colours = [colours[name] for name in series]
    axes.hist(list(series.values()), edges.tolist(), stacked=True, color=bar_colours, label=list(series), linewidth=0)
    if logarithmic:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=integer))
    axes.margins(x=0.5 if len(edges) == 2 else 0.02)  # a single value gets a narrow bar
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    add_legend(axes)
    return to_svg(figure)


def draw_intensities(means: Mapping[str, np.ndarray], colours: Mapping[str, str]) -> bytes:
    """Draw one line per series as SVG: the share of pixels in each bin of the uint8 intensity."""
    figure, axes = new_axes("Intensities", "intensity after windowing, 0 to 255", "share of pixels, %", DIAGRAM_SIZE)
    for name, mean in means.items():
        edges = np.linspace(0, 256, len(mean) + 1)
        axes.stairs(100 * mean, edges, baseline=None, color=colours[name], label=name, linewidth=1.6)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.01)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(0, 256)
    axes.set_xticks([0, 64, 128, 192, 255])
    add_legend(axes)
    return to_svg(figure)


def _bar_edges(low: float, high: float, integer: bool, logarithmic: bool) -> np.ndarray:
    """Edges of about 30 bars from `low` to `high`, or of one bar if these are equal."""
    if high - low < 1e-3 * high:
        return np.array([low * 0.99, high * 1.01])
    if logarithmic:
        return np.geomspace(low * 0.999, high * 1.001, MAX_BARS + 1)
    if integer:
        step = max(1, -(-round(high - low + 1) // MAX_BARS))
        return np.arange(low - 0.5, high + step, step)
    return np.linspace(low, high * 1.0001, MAX_BARS + 1)


def draw_segment(index: SegmentIndex, number: int) -> Picture:
    """Draw the frame of segment `number` that shows most of its objects; small ones count as much as large ones.

    Raises:
        UserError: the shard is missing, truncated or damaged.
    """
    row = index.row(number)
    visible = [np.asarray(o.pixels) / max(1, *o.pixels) for o in row.objects]
    frame = int(np.argmax(np.sum(visible, axis=0))) if visible else 0
    image, planes = load_frame(index, row, frame)
    text = f"{row.dataset} {row.split}, {row.modality}, case {row.case}, frame {row.frames[frame]}"
    return draw_labels(image, planes, {(o.plane, o.value): o.name for o in row.objects}, text)


def draw_labels(image: np.ndarray, planes: np.ndarray, names: dict[tuple[int, int], str], text: str) -> Picture:
    """Draw a frame uint8 [H, W(, 3)] with planes [P, H, W]. names: by (plane, value); other values have none."""
    values = [(p, int(v)) for p, plane in enumerate(planes) for v in np.unique(plane[plane > 0])]
    titles = {key: names.get(key, f"value {key[1]}") for key in values}
    colours = {title: OBJECTS[i % len(OBJECTS)] for i, title in enumerate(dict.fromkeys(titles.values()))}
    outlines = tuple(Outline(planes[p] == v, colours[titles[p, v]]) for p, v in values)
    more = f"and {len(colours) - MAX_NAMES} more; " if len(colours) > MAX_NAMES else ""
    content = encode(draw_frame(Frame(image, outlines), THUMBNAIL_SIDE))
    return Picture(content, more + text, colours=tuple(colours.items())[:MAX_NAMES], alt=text)
