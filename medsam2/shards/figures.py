"""Distributions over cases and objects as small SVG pictures, one colour a modality (or a data set).

Legend: T frames, H and W pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from medsam2.shards.tables import ShardTables

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, less yellow
OTHERS, OTHERS_COLOUR = "others", "#999999"
SIZE = (4.4, 2.9)  # inches
BINS = 30
LOG_RATIO = 30.0  # of the largest to the smallest value, from which an axis is logarithmic
INTENSITY_BINS = 32
LIMIT = 2_000_000  # values of a series that are drawn; more change no bar that an eye can see


@dataclass(frozen=True, eq=False)
class Chart:
    """A drawn figure: base64 SVG, what it shows, and what was left out."""

    title: str
    data: str
    note: str = ""


@dataclass(frozen=True, eq=False)
class Distribution:
    """Values by series. label: of the x axis, with its unit. counted: what the y axis counts."""

    title: str
    label: str
    counted: str
    values: Mapping[str, np.ndarray]
    note: str = ""
    whole: bool = False  # whole numbers: a bar a number where there are few
    log: bool = False  # whatever the values span


def charts(tables: ShardTables, histograms: Mapping[int, np.ndarray], histogram_note: str = "") -> list[Chart]:
    """Every figure of a page, without those that have nothing to show; a series has one colour in all of them."""
    column = series_column(tables.cases)
    colours = palette(tables.cases[column].value_counts().to_dict())
    found = []
    if histograms:
        of_segment = tables.segments[column].to_numpy()
        shares: dict[str, list[np.ndarray]] = {}
        for row, histogram in histograms.items():
            shares.setdefault(of_segment[row], []).append(np.asarray(histogram) / max(1, np.sum(histogram)))
        shown = merge({name: np.stack(parts) for name, parts in shares.items()}, colours)
        picture = draw_intensities({name: parts.mean(axis=0) for name, parts in shown.items()}, colours)
        found.append(Chart("Intensities", picture, histogram_note))
    for distribution in distributions(tables, column):
        shown = {name: v for name, v in merge(distribution.values, colours).items() if len(v)}
        if shown:
            found.append(Chart(distribution.title, draw(distribution, shown, colours), distribution.note))
    return found


def palette(sizes: Mapping[str, int]) -> dict[str, str]:
    """A colour for each of the seven largest series; smaller ones share the grey of `others`."""
    shown = sorted(sizes, key=lambda name: (-sizes[name], name))[: len(COLOURS)]
    return dict(zip(sorted(shown), COLOURS, strict=False)) | {OTHERS: OTHERS_COLOUR}


def merge(values: Mapping[str, np.ndarray], colours: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Series in the order of `colours`, those without a colour of their own joined as `others`."""
    own = {name: values[name] for name in colours if name in values}
    rest = [v for name, v in values.items() if name not in colours]
    return own | ({OTHERS: np.concatenate(rest)} if rest else {})


def series_column(cases: pd.DataFrame) -> str:
    """Colours stand for modalities, or for data sets where there is one modality."""
    return "modality" if cases["modality"].nunique() > 1 else "dataset"


def distributions(tables: ShardTables, column: str) -> list[Distribution]:
    """Spacing, size and length of cases; area and length of objects."""
    cases, objects = tables.cases, tables.case_objects
    volumes, clips = cases[cases["kind"] == "volume"], cases[cases["kind"] == "clip"]
    # readers give pixels of exactly 1 mm where a clip or a still does not say its size
    unknown = (cases["kind"] != "volume") & (cases["spacing_y"] == 1) & (cases["spacing_x"] == 1)
    known = cases[~unknown]
    left_out = f"Without {unknown.sum():,} clips and stills of unknown pixel size." if unknown.any() else ""
    area: dict[str, list[np.ndarray]] = {}
    for (dataset, _, modality, _), pixels in tables.areas.items():
        area.setdefault(modality if column == "modality" else dataset, []).append(pixels)
    of_objects = cases[column].to_numpy()[objects["case_number"].to_numpy()]
    in_plane = np.sqrt(known["spacing_y"] * known["spacing_x"])
    longest = cases[["original_h", "original_w"]].max(axis=1)
    return [
        Distribution("Pixel size", "in-plane spacing, mm", "cases", _by(known[column], in_plane), left_out),
        Distribution("Slice spacing", "slice spacing, mm", "volumes", _by(volumes[column], volumes["spacing_t"])),
        Distribution("Frame size", "longer side of the frame, pixels", "cases", _by(cases[column], longest)),
        Distribution("Volumes", "slices of a volume", "volumes", _by(volumes[column], volumes["original_t"]), "", True),
        Distribution("Clips", "frames of a clip", "clips", _by(clips[column], clips["original_t"]), "", True),
        Distribution(
            "Object area",
            "pixels of an object on a frame (stored grid)",
            "objects on frames",
            {key: np.concatenate(parts) for key, parts in area.items()},
            log=True,
        ),
        Distribution(
            "Frames with an object", "frames of a case on which an object is seen", "objects",
            _by(of_objects, objects["frames"]), whole=True,
        ),
    ]  # fmt: skip


def draw(distribution: Distribution, series: Mapping[str, np.ndarray], colours: Mapping[str, str]) -> str:
    """Stacked bars of `series` as base64 SVG; a logarithmic axis where values span decades."""
    from matplotlib.ticker import MaxNLocator

    usable = {name: v[np.isfinite(v) & (v > 0)] for name, v in series.items()}
    limits = [(float(v.min()), float(v.max())) for v in usable.values() if v.size]
    low, high = (min(a for a, _ in limits), max(b for _, b in limits)) if limits else (1.0, 1.0)
    logarithmic = distribution.log or high / low > LOG_RATIO
    edges = _edges(low, high, distribution.whole, logarithmic)
    figure, axes = _axes(distribution.label, distribution.counted)
    bottom = np.zeros(len(edges) - 1)
    for name, values in usable.items():
        count = _count(values, edges)
        axes.bar(edges[:-1], count, np.diff(edges), bottom, align="edge", color=colours[name], label=name, linewidth=0)
        bottom += count
    if logarithmic:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=distribution.whole))
    if len(edges) == 2:  # one value: a narrow bar rather than a full picture
        axes.set_xlim(0.8 * low, 1.2 * high)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return _finish(figure, axes, len(series))


def draw_intensities(means: Mapping[str, np.ndarray], colours: Mapping[str, str]) -> str:
    """One line a series: the share of pixels in each of 32 bins of the uint8 intensity, as base64 SVG."""
    figure, axes = _axes("intensity after windowing, 0 to 255", "share of pixels, %")
    edges = np.linspace(0, 256, INTENSITY_BINS + 1)
    for name, mean in means.items():
        axes.stairs(100 * mean, edges, baseline=None, color=colours[name], label=name, linewidth=1.6)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.01)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(0, 256)
    axes.set_xticks([0, 64, 128, 192, 255])
    return _finish(figure, axes, len(means))


def _count(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Values between edges, from a part of them where there are very many."""
    step = max(1, -(-len(values) // LIMIT))
    return np.asarray(np.histogram(values[::step], edges)[0] * step)


def _by(series: pd.Series | np.ndarray, values: pd.Series) -> dict[str, np.ndarray]:
    names, numbers = np.asarray(series), values.to_numpy()
    return {str(name): numbers[names == name] for name in sorted(set(names.tolist()))}


def _edges(low: float, high: float, whole: bool, logarithmic: bool) -> np.ndarray:
    """Edges of about 30 bars from `low` to `high`; of one bar where these are the same."""
    if high - low < 1e-3 * high:
        return np.array([low * 0.99, high * 1.01])
    if logarithmic:
        return np.geomspace(low * 0.999, high * 1.001, BINS + 1)
    if whole:
        step = max(1, -(-round(high - low + 1) // BINS))
        return np.arange(low - 0.5, high + step, step)
    return np.linspace(low, high * 1.0001, BINS + 1)


def _axes(label: str, counted: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(label)
    axes.set_ylabel(counted)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb")
    axes.set_axisbelow(True)
    return figure, axes


def _finish(figure: Figure, axes: Axes, series: int) -> str:
    if series > 1:
        figure.legend(
            *axes.get_legend_handles_labels(),
            loc="outside upper left",
            ncols=4,
            frameon=False,
            fontsize=8.5,
            handlelength=1.2,
            columnspacing=1.2,
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return base64.b64encode(buffer.getvalue()).decode()
