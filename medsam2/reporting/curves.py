"""Line diagrams, several in one figure, and axes of the same style for other figures.

    figure = draw_diagrams([Diagram("Loss", (Line("training", steps, losses),), smooth=True)])
    content = to_svg(figure)          # for a page; to_png(figure) for a file

Draw bars and boxes with matplotlib on the axes of `new_axes`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from medsam2.reporting.style import DIM, GROUND, RULE, SERIES, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 400  # per line; more are averaged
MAX_LINES = 8  # per diagram
SMOOTHING = 0.9  # weight of the earlier mean in the exponential mean
MARKERS = "os^DvPX*"
DIAGRAM_SIZE = (6.2, 2.75)  # inches


@dataclass(frozen=True)
class Line:
    """y over x; NaN breaks the line. Without a label it is not in the legend; without a colour it gets the next one."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = ""


@dataclass(frozen=True)
class Diagram:
    """One diagram.

    Attributes:
        smooth: draw an exponential mean, and the noisy values faintly.
        log: use a logarithmic y axis if all values are positive. limits: of the y axis.
        markers: draw a marker at each value.
    """

    title: str
    lines: tuple[Line, ...]
    smooth: bool = False
    log: bool = False
    markers: bool = False
    limits: tuple[float, float] | None = None
    x_label: str = ""
    y_label: str = ""


def draw_diagrams(
    diagrams: Sequence[Diagram],
    columns: int = 2,
    size: tuple[float, float] = DIAGRAM_SIZE,
    shared_legend: bool = False,
) -> Figure:
    """Draw diagrams in rows of `columns`.

    Args:
        size: width and height of each diagram in inches.
        shared_legend: draw one legend for all diagrams, which have the same lines, instead of one per diagram.
    """
    columns = min(columns, len(diagrams))
    rows = -(-len(diagrams) // columns)
    figure = _new_figure((size[0] * columns, size[1] * rows + 0.45 * shared_legend))
    for place, diagram in enumerate(diagrams):
        axes = figure.add_subplot(rows, columns, place + 1)
        _draw_diagram(axes, diagram)
        if not shared_legend:
            add_legend(axes)
    if shared_legend:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=8, labelcolor=TEXT)
    return figure


def new_axes(
    title: str = "", x_label: str = "", y_label: str = "", size: tuple[float, float] = DIAGRAM_SIZE
) -> tuple[Figure, Axes]:
    """Create a figure with empty axes in the style of the page. size: in inches."""
    figure = _new_figure(size)
    axes = figure.add_subplot()
    _style(axes, title, x_label, y_label)
    return figure, axes


def add_legend(axes: Axes) -> None:
    """Add a legend between the title and the axes, so that it hides no values."""
    labels = axes.get_legend_handles_labels()[1]
    if not labels:
        return
    columns = max(1, min(len(labels), int(60 / (max(map(len, labels)) + 5))))
    rows = -(-len(labels) // columns)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, frameon=False, labelcolor=TEXT, fontsize=8,
        handlelength=1.4, columnspacing=1.2, borderaxespad=0.1, borderpad=0.1,
    )  # fmt: skip
    axes.set_title(axes.get_title("left"), loc="left", color=TEXT, fontsize=10, fontweight="bold", pad=6 + 13 * rows)


def to_svg(figure: Figure) -> bytes:
    """Encode the figure as SVG: text stays text, and equal figures give equal bytes."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "medsam2", "font.family": "sans-serif"}):
        figure.savefig(content, format="svg", facecolor=GROUND, metadata={"Date": None})
    return content.getvalue()


def to_png(figure: Figure) -> bytes:
    """Encode the figure as PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", facecolor=GROUND, dpi=120)
    return content.getvalue()


def _new_figure(size: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=size, facecolor=GROUND, layout="constrained")


def _style(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", color=TEXT, fontsize=10, fontweight="bold")
    axes.set_xlabel(x_label, color=DIM, fontsize=8.5)
    axes.set_ylabel(y_label, color=DIM, fontsize=8.5)
    axes.set_facecolor(GROUND)
    axes.tick_params(colors=DIM, labelsize=8, which="both", length=0)
    axes.grid(color=RULE, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _draw_diagram(axes: Axes, diagram: Diagram) -> None:
    import pandas as pd

    _style(axes, diagram.title, diagram.x_label, diagram.y_label)
    lines = diagram.lines[:MAX_LINES]
    for place, line in enumerate(lines):
        colour = line.colour or SERIES[place % len(SERIES)]
        points = pd.DataFrame({"x": line.x, "y": line.y})
        groups = np.arange(len(points)) // -(-len(points) // MAX_POINTS)
        points = points.groupby(groups).agg({"x": "last", "y": "mean"})
        if diagram.smooth and len(points) > 12:
            axes.plot(points["x"], points["y"], color=colour, lw=0.7, alpha=0.3)
            points["y"] = points["y"].ewm(alpha=1 - SMOOTHING).mean()
        marker = MARKERS[place % len(MARKERS)] if diagram.markers or len(points) < 3 else ""
        axes.plot(points["x"], points["y"], color=colour, lw=1.7, marker=marker, ms=4, label=line.label or "_")
    if diagram.log and all(value > 0 for line in lines for value in line.y):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    if diagram.limits is not None:
        axes.set_ylim(*diagram.limits)
    axes.margins(x=0.02)
