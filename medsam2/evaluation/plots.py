"""Figures of an evaluation's page, in its colours: how the scores of each structure are spread."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from medsam2.evaluation.overlays import DIM, GROUND, PREDICTIONS, TEXT
from medsam2.evaluation.tables import NAMES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 60  # of a box: more are shown by the box alone
WIDTH = 11.0  # inches
LINE = 0.2  # inches a box


def draw_boxes(rows: pd.DataFrame, labels: Sequence[str], score: str = "dsc") -> Figure:
    """Box plots: a block a structure (with its modality), in it a box for each checkpoint.

    Boxes are quartiles, whiskers 5 % and 95 %; every object is a dot where there are few.

    Args:
        rows: of one protocol, uncorrupted. labels: checkpoints in order.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    blocks = list(rows.groupby(["modality", "structure"], sort=True))
    tall = len(blocks) * (len(labels) * LINE + 0.22)
    figure = Figure(figsize=(WIDTH, tall + 0.95), facecolor=GROUND)
    height = tall + 0.95
    axes = figure.add_axes((2.3 / WIDTH, 0.5 / height, 1 - 2.5 / WIDTH, tall / height))
    ticks, names = [], []
    for block, (keys, part) in enumerate(blocks):
        modality, structure = keys
        start = block * (len(labels) + 0.85)
        for place, label in enumerate(labels):
            values = part.loc[part["checkpoint"] == label, score].dropna().to_numpy()
            _box(axes, values, start + place, PREDICTIONS[place % len(PREDICTIONS)])
        ticks.append(start + (len(labels) - 1) / 2)
        objects = int((part["checkpoint"] == labels[0]).sum())
        names.append(f"{structure}\n{modality}, {objects} object{'s' * (objects != 1)}")
        if block:
            axes.axhline(start - 0.93, color="#21262d", lw=0.8)
    _style(axes, ticks, names, NAMES.get(score, score))
    axes.set_ylim(len(blocks) * (len(labels) + 0.85) - 0.85 - 0.1, -0.9)
    handles = [
        Line2D([], [], color=PREDICTIONS[i % len(PREDICTIONS)], lw=6, alpha=0.6, label=label)
        for i, label in enumerate(labels)
    ]
    figure.legend(handles=handles, loc="upper right", ncols=min(len(labels), 5), frameon=False, labelcolor=TEXT,
                  fontsize=9, bbox_to_anchor=(1, 1))  # fmt: skip
    return figure


def _box(axes: Axes, values: Any, place: float, colour: str) -> None:
    import numpy as np

    if len(values) == 0:
        return
    if len(values) > 2:
        axes.boxplot(
            [values], positions=[place], orientation="horizontal", widths=0.62, whis=(5, 95), showfliers=False,
            patch_artist=True, boxprops={"facecolor": f"{colour}44", "edgecolor": colour, "lw": 1},
            medianprops={"color": colour, "lw": 2.2}, whiskerprops={"color": colour, "lw": 1},
            capprops={"color": colour, "lw": 1},
        )  # fmt: skip
    if len(values) <= MOST_POINTS:
        spread = place + np.random.default_rng(0).uniform(-0.2, 0.2, len(values)) * (len(values) > 1)
        axes.plot(values, spread, "o", ms=5.5, color=colour, mec=GROUND, mew=0.5, alpha=0.85)


def _style(axes: Axes, ticks: list[float], names: list[str], score: str) -> None:
    axes.set_facecolor(GROUND)
    axes.set_yticks(ticks, names)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel(score, color=DIM, fontsize=9)
    axes.tick_params(axis="y", colors=TEXT, length=0, labelsize=8.5)
    axes.tick_params(axis="x", colors=DIM, labelsize=8.5)
    axes.grid(axis="x", color="#21262d", lw=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes for the same figure; letters stay letters."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "medsam2", "font.family": "sans-serif"}):
        figure.savefig(content, format="svg", facecolor=GROUND, metadata={"Date": None})
    return content.getvalue()
