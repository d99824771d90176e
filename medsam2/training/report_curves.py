"""The curves of a run's page, from metrics.csv: one SVG, in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medsam2.cases.case import MODALITIES
from medsam2.evaluation.overlays import DIM, GROUND, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#38bdf8", "#fbbf24", "#34d399", "#f472b6", "#c084fc", "#fb7185", "#a3e635", "#94a3b8")
LINE = "#21262d"
WIDTH, TALL = 12.4, 2.75  # inches: of the figure, of a row of panels
POINTS = 400  # of a line; more are averaged
SMOOTH = 0.9  # share of the earlier mean at each of the points
LEGEND = 8

Metrics = Mapping[int, Mapping[str, float]]
Series = tuple[list[int], list[float]]
PARTS = ("focal", "dice", "iou", "presence", "distillation")


@dataclass(frozen=True)
class Panel:
    """One diagram. lines: name and series. smooth: noisy, so that a running mean stands out. log: the y axis."""

    title: str
    lines: tuple[tuple[str, Series], ...]
    smooth: bool = False
    log: bool = False
    marks: bool = False
    limits: tuple[float, float] | None = None


def series(metrics: Metrics, name: str) -> Series:
    """(steps, finite values) of a column."""
    found = [(step, row[name]) for step, row in sorted(metrics.items()) if math.isfinite(row.get(name, math.nan))]
    return [step for step, _ in found], [value for _, value in found]


def columns(metrics: Metrics, chosen: Callable[[str], bool]) -> list[str]:
    """The names of the columns that `chosen` takes, sorted."""
    return sorted({name for row in metrics.values() for name in row if chosen(name)})


def panels(metrics: Metrics) -> list[Panel]:
    """Every panel that has something to show."""

    def lines(names: Mapping[str, str] | Sequence[tuple[str, str]]) -> tuple[tuple[str, Series], ...]:
        pairs = names.items() if isinstance(names, Mapping) else names
        found = [(label, series(metrics, name)) for label, name in pairs]
        return tuple((label, line) for label, line in found if line[0])

    kinds = columns(metrics, lambda name: name.startswith("train/loss_"))
    scored = [name for name in columns(metrics, is_mean_score) if name.split("/")[1] in MODALITIES]
    scores = {"mean": "val/dsc", **{name.split("/")[1]: name for name in scored}}
    kept = {"retention": "val/retention", "obeyed boxes": "val/obedience"}
    wanted = [
        Panel("Loss", lines({"training": "train/loss", "validation clips": "val/loss"}), smooth=True),
        Panel("Loss by part, unweighted", lines({part: f"train/{part}" for part in PARTS}), smooth=True, log=True),
        Panel("Loss by kind of prompt", lines({name.removeprefix("train/loss_"): name for name in kinds}), smooth=True),
        Panel("Validation DSC", lines({**scores, **kept}), marks=True, limits=(0, 1)),
        Panel("Learning rate", distinct(lines([(rate_name(n), n) for n in columns(metrics, is_rate)]))),
        Panel("Gradient norm before clipping", lines({"": "train/grad_norm"}), smooth=True, log=True),
        Panel("Clips a second of each rank", lines({"": "train/clips_per_second"}), smooth=True),
        Panel("Share of the time spent waiting for data", lines({"": "train/data_wait"}), smooth=True, limits=(0, 1)),
    ]
    return [panel for panel in wanted if panel.lines]


def is_mean_score(name: str) -> bool:
    """`val/CT/dsc`, `val/box/dsc`, `val/liver/dsc`."""
    return name.startswith("val/") and name.endswith("/dsc") and name.count("/") == 2


def is_rate(name: str) -> bool:
    return name.startswith("lr-")


def rate_name(name: str) -> str:
    """`lr-AdamW/image_encoder/3` (a group of parameters) -> `image_encoder`."""
    return name.split("/")[1] if "/" in name else name.removeprefix("lr-")


def distinct(lines: tuple[tuple[str, Series], ...]) -> tuple[tuple[str, Series], ...]:
    """Groups of one rate are one line with all names."""
    together: dict[tuple[float, ...], list[tuple[str, Series]]] = {}
    for label, line in lines:
        together.setdefault(tuple(line[1]), []).append((label, line))
    return tuple((few(dict.fromkeys(label for label, _ in same)), same[0][1]) for same in together.values())


def few(names: Iterable[str]) -> str:
    """`a, b` or `a and 4 more`."""
    first, *others = names
    return ", ".join([first, *others]) if len(others) < 2 else f"{first} and {len(others)} more"


def draw_curves(metrics: Metrics) -> bytes:
    """All panels as one SVG; empty where nothing was logged."""
    from matplotlib.figure import Figure

    from medsam2.evaluation.plots import to_svg

    shown = panels(metrics)
    if not shown:
        return b""
    rows = -(-len(shown) // 2)
    figure = Figure(figsize=(WIDTH, TALL * rows), facecolor=GROUND, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # type: ignore[union-attr,call-arg]
    for place, panel in enumerate(shown):
        draw_panel(figure.add_subplot(rows, 2, place + 1), panel)
    return to_svg(figure)


def draw_panel(axes: Axes, panel: Panel) -> None:
    log = panel.log and all(min(values) > 0 for _, (_, values) in panel.lines)
    for place, (label, line) in enumerate(panel.lines[:LEGEND]):
        colour = COLOURS[place % len(COLOURS)]
        steps, values = thinned(line)
        if panel.smooth and len(steps) > 12:
            axes.plot(steps, values, color=colour, lw=0.7, alpha=0.35)
            axes.plot(steps, running_mean(values), color=colour, lw=1.8, label=label)
        else:
            few = panel.marks or len(steps) < 3
            axes.plot(steps, values, color=colour, lw=1.8, label=label, marker="o" if few else "", ms=4)
    if log:
        axes.set_yscale("log")
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    axes.set_title(panel.title, color=TEXT, fontsize=10, loc="left", fontweight="bold")
    axes.set_facecolor(GROUND)
    axes.tick_params(colors=DIM, labelsize=8, which="both", length=0)
    axes.grid(color=LINE, lw=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if any(label for label, _ in panel.lines):
        axes.legend(frameon=False, labelcolor=TEXT, fontsize=8, ncols=2 if len(panel.lines) > 4 else 1)


def thinned(line: Series) -> Series:
    """At most `POINTS` points: means over equal stretches."""
    steps, values = line
    width = -(-len(steps) // POINTS)
    if width < 2:
        return line
    starts = range(0, len(steps), width)
    means = [math.fsum(values[s : s + width]) / len(values[s : s + width]) for s in starts]
    return [steps[min(s + width, len(steps)) - 1] for s in starts], means


def running_mean(values: Sequence[float]) -> list[float]:
    """Exponential mean without the pull of a start at zero."""
    found, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = SMOOTH * total + (1 - SMOOTH) * value, SMOOTH * weight + (1 - SMOOTH)
        found.append(total / weight)
    return found
