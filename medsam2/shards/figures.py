"""Distributions over cases and objects as small SVG pictures, one colour a modality (or a data set).

Legend: T frames, H and W pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
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
SIZE = (5.4, 3.1)  # inches
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


def charts(tables: ShardTables, histograms: Mapping[int, np.ndarray], histogram_note: str = "") -> list[Chart]:
    """Every figure of a page, without those that have nothing to show."""
    found = []
    column = series_column(tables.cases)
    if histograms:
        found.append(Chart("Intensities", draw_intensities(_mean(tables, histograms, column)), histogram_note))
    for distribution in distributions(tables, column):
        if any(len(v) for v in distribution.values.values()):
            found.append(Chart(distribution.title, draw(distribution), distribution.note))
    return found


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
        ),
        Distribution(
            "Frames with an object", "frames of a case on which an object is seen", "objects",
            _by(of_objects, objects["frames"]), whole=True,
        ),
    ]  # fmt: skip


def draw(distribution: Distribution) -> str:
    """Stacked bars of a distribution as base64 SVG; a logarithmic axis where values span decades."""
    from matplotlib.ticker import MaxNLocator

    series = few(distribution.values)
    positive = [v[np.isfinite(v) & (v > 0)] for v in series.values()]
    everything = np.concatenate(positive)
    figure, axes = _axes(distribution.label, distribution.counted)
    low, high = (everything.min(), everything.max()) if everything.size else (1.0, 1.0)
    edges = _edges(float(low), float(high), distribution.whole)
    counts = [np.histogram(v, edges)[0] for v in positive]
    bottom = np.zeros(len(edges) - 1)
    for colour, (name, count) in zip(_colours(series), zip(series, counts, strict=True), strict=True):
        axes.bar(edges[:-1], count, np.diff(edges), bottom, align="edge", color=colour, label=name, linewidth=0)
        bottom += count
    if high / low > LOG_RATIO:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return _finish(figure, axes, len(series))


def draw_intensities(means: Mapping[str, np.ndarray]) -> str:
    """One line a series: the share of pixels in each of 32 bins of the uint8 intensity, as base64 SVG."""
    figure, axes = _axes("intensity after windowing, 0 to 255", "share of pixels, %")
    edges = np.linspace(0, 256, INTENSITY_BINS + 1)
    for colour, (name, mean) in zip(_colours(means), means.items(), strict=True):
        axes.stairs(100 * mean, edges, color=colour, label=name, linewidth=1.8)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.01)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(0, 256)
    axes.set_xticks([0, 64, 128, 192, 255])
    return _finish(figure, axes, len(means))


def few(series: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """At most eight series by size: the smaller ones of more become `others`."""
    ordered = sorted(series, key=lambda name: (-len(series[name]), name))
    shown, rest = ordered[: len(COLOURS)], ordered[len(COLOURS) :]
    result = {name: _thin(np.asarray(series[name], np.float64)) for name in sorted(shown)}
    return result | ({OTHERS: np.concatenate([series[name] for name in rest])} if rest else {})


def _thin(values: np.ndarray) -> np.ndarray:
    return values[:: -(-len(values) // LIMIT) or 1]


def _mean(tables: ShardTables, histograms: Mapping[int, np.ndarray], column: str) -> dict[str, np.ndarray]:
    """The mean share of pixels in each bin, by series; every segment counts the same."""
    of_segment = tables.segments[column]
    shares: dict[str, list[np.ndarray]] = {}
    for row, histogram in histograms.items():
        shares.setdefault(of_segment.iat[row], []).append(np.asarray(histogram) / max(1, np.sum(histogram)))
    ordered = sorted(shares, key=lambda name: (-len(shares[name]), name))
    shown, rest = sorted(ordered[: len(COLOURS)]), ordered[len(COLOURS) :]
    result = {name: np.mean(shares[name], axis=0) for name in shown}
    return result | ({OTHERS: np.mean([s for name in rest for s in shares[name]], axis=0)} if rest else {})


def _by(series: pd.Series | np.ndarray, values: pd.Series) -> dict[str, np.ndarray]:
    names, numbers = np.asarray(series), values.to_numpy()
    return {str(name): numbers[names == name] for name in sorted(set(names.tolist()))}


def _edges(low: float, high: float, whole: bool) -> np.ndarray:
    """Edges of about 30 bars from `low` to `high`."""
    if high / low > LOG_RATIO:
        return np.geomspace(low * 0.999, high * 1.001, BINS + 1)
    if whole:
        step = max(1, -(-round(high - low + 1) // BINS))
        return np.arange(low - 0.5, high + step, step)
    if high - low < 1e-3 * high:  # one value: a bar of some width around it
        return np.array([low * 0.95, low * 1.05])
    return np.linspace(low, high * 1.0001, BINS + 1)


def _colours(series: Mapping[str, np.ndarray]) -> Sequence[str]:
    return [OTHERS_COLOUR if name == OTHERS else COLOURS[place] for place, name in enumerate(series)]


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
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return base64.b64encode(buffer.getvalue()).decode()
