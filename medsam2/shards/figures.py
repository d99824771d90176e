"""Figures of the page: distributions over cases and objects as diagrams, and thumbnails of frames with outlines.

In the diagrams each modality (or, where there is one alone, each dataset) has a colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from medsam2.reporting.curves import add_legend, new_axes, to_svg
from medsam2.reporting.overlays import Frame, Outline, draw_frame, encode
from medsam2.reporting.page import Picture
from medsam2.reporting.style import OBJECTS, OTHERS, SERIES
from medsam2.shards.index import SegmentIndex
from medsam2.shards.load import load_frame
from medsam2.shards.tables import ShardTables

if TYPE_CHECKING:
    import pandas as pd

SIZE = (4.4, 2.9)  # inches
MAX_BARS = 30
LOG_AXIS_RATIO = 30.0  # of the largest to the smallest value, from which the axis is logarithmic
OTHER_SERIES = "others"
THUMBNAIL_SIDE = 320  # pixels
MAX_NAMES = 6  # structures in a caption


def charts(tables: ShardTables, histograms: Mapping[int, np.ndarray], histogram_note: str = "") -> list[Picture]:
    """Every diagram that has something to show; a series has one colour in all of them.

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
    for title, label, counted, values, note in _distributions(tables, column, names):
        if any(len(part) for part in values.values()):
            content = draw_bars(title, label, counted, values, colours)
            pictures.append(Picture(content, note, "svg+xml", alt=title))
    return pictures


def _distributions(
    tables: ShardTables, column: str, names: Mapping[str, str]
) -> list[tuple[str, str, str, dict[str, np.ndarray], str]]:
    """Spacing, size and length of cases; area and length of objects: (title, x label, y label, values, note)."""
    cases, objects = tables.cases, tables.case_objects
    series = cases[column].map(names)
    volumes, clips = cases[cases["kind"] == "volume"], cases[cases["kind"] == "clip"]
    # readers give pixels of exactly 1 mm where a clip or a still does not say its size
    unknown = (cases["kind"] != "volume") & (cases["spacing_y"] == 1) & (cases["spacing_x"] == 1)
    in_plane = np.sqrt(cases["spacing_y"] * cases["spacing_x"])[~unknown]
    left_out = f"Without {unknown.sum():,} clips and stills of unknown pixel size." if unknown.any() else ""
    areas, frames = (objects[name].set_axis(objects["case_number"]) for name in ("largest", "frames"))
    longest = cases[["original_h", "original_w"]].max(axis=1)
    return [
        ("Pixel size", "in-plane spacing, mm", "cases", _by(series, in_plane), left_out),
        ("Slice spacing", "slice spacing, mm", "volumes", _by(series, volumes["spacing_t"]), ""),
        ("Frame size", "longer side of the frame, pixels", "cases", _by(series, longest), ""),
        ("Volumes", "slices of a volume", "volumes", _by(series, volumes["original_t"]), ""),
        ("Clips", "frames of a clip", "clips", _by(series, clips["original_t"]), ""),
        ("Object area", "pixels of an object on its largest frame", "objects", _by(series, areas), ""),
        ("Frames with an object", "frames of a case on which an object is visible", "objects", _by(series, frames), ""),
    ]


def _by(series: pd.Series, values: pd.Series) -> dict[str, np.ndarray]:
    """The positive values of each series; `values` have the number of their case as index."""
    values = values[np.isfinite(values) & (values > 0)]
    return {name: group.to_numpy() for name, group in values.groupby(series.reindex(values.index).to_numpy())}


def draw_bars(
    title: str, label: str, counted: str, series: Mapping[str, np.ndarray], colours: Mapping[str, str]
) -> bytes:
    """Stacked bars of positive values as SVG, on a logarithmic axis where the values span decades.

    Args:
        label, counted: of the x axis, with its unit, and of the y axis.
    """
    from matplotlib.ticker import MaxNLocator

    everything = np.concatenate(list(series.values()))
    low, high = float(everything.min()), float(everything.max())
    whole, logarithmic = bool(np.issubdtype(everything.dtype, np.integer)), high / low > LOG_AXIS_RATIO
    edges = _edges(low, high, whole, logarithmic)
    figure, axes = new_axes(title, label, counted, SIZE)
    colour = [colours[name] for name in series]
    axes.hist(list(series.values()), edges, stacked=True, color=colour, label=list(series), linewidth=0)
    if logarithmic:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
    axes.margins(x=0.5 if len(edges) == 2 else 0.02)  # of one value a narrow bar rather than a full picture
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    add_legend(axes)
    return to_svg(figure)


def draw_intensities(means: Mapping[str, np.ndarray], colours: Mapping[str, str]) -> bytes:
    """One line a series as SVG: the share of pixels in each bin of the uint8 intensity."""
    figure, axes = new_axes("Intensities", "intensity after windowing, 0 to 255", "share of pixels, %", SIZE)
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


def _edges(low: float, high: float, whole: bool, logarithmic: bool) -> np.ndarray:
    """Edges of about 30 bars from `low` to `high`; of one bar where these are the same."""
    if high - low < 1e-3 * high:
        return np.array([low * 0.99, high * 1.01])
    if logarithmic:
        return np.geomspace(low * 0.999, high * 1.001, MAX_BARS + 1)
    if whole:
        step = max(1, -(-round(high - low + 1) // MAX_BARS))
        return np.arange(low - 0.5, high + step, step)
    return np.linspace(low, high * 1.0001, MAX_BARS + 1)


def segment_picture(index: SegmentIndex, number: int) -> Picture:
    """The frame of segment `number` that shows most of its objects: small ones count as much as large ones.

    Raises:
        UserError: the shard is missing, cut short or damaged.
    """
    row = index.row(number)
    visible = [np.asarray(o.pixels) / max(1, *o.pixels) for o in row.objects]
    frame = int(np.argmax(np.sum(visible, axis=0))) if visible else 0
    image, planes = load_frame(index, row, frame)
    text = f"{row.dataset} {row.split}, {row.modality}, case {row.case}, frame {row.frames[frame]}"
    return labelled_picture(image, planes, {(o.plane, o.value): o.name for o in row.objects}, text)


def labelled_picture(image: np.ndarray, planes: np.ndarray, names: dict[tuple[int, int], str], text: str) -> Picture:
    """A frame uint8 [H, W(, 3)] with planes [P, H, W]. names: by (plane, value); other values are drawn unnamed."""
    values = [(p, int(v)) for p, plane in enumerate(planes) for v in np.unique(plane[plane > 0])]
    titles = {key: names.get(key, f"value {key[1]}") for key in values}
    colours = {title: OBJECTS[i % len(OBJECTS)] for i, title in enumerate(dict.fromkeys(titles.values()))}
    outlines = tuple(Outline(planes[p] == v, colours[titles[p, v]]) for p, v in values)
    more = f"and {len(colours) - MAX_NAMES} more; " if len(colours) > MAX_NAMES else ""
    content = encode(draw_frame(Frame(image, outlines), THUMBNAIL_SIDE))
    return Picture(content, more + text, colours=tuple(colours.items())[:MAX_NAMES], alt=text)
