"""The figure of docs/explanation/scaling.md."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from scaling_yield import Costs

from medsam2.files import atomic_write

GROUND, TEXT, DIM = "#0b0f14", "#e6edf3", "#8b98a5"
COLOUR = "#bc8cff"


def draw(rows: list[dict[str, Any]], costs: Costs, path: Path) -> None:
    """Draw clips per second, waiting time and bytes per clip over the number of GPUs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained", facecolor=GROUND)
    left, middle, right = figure.subplots(1, 3)
    gpus = [row["gpus"] for row in rows]
    for axes, title in ((left, "clips a second"), (middle, "share of the time that GPUs wait"),
                        (right, "MB fetched for a clip")):  # fmt: skip
        _dress(axes, title, gpus)
    left.plot(gpus, [n / costs.gpu_s for n in gpus], color=DIM, ls=":", label="ideal")
    style = {"color": COLOUR, "marker": "o", "ms": 3.5, "lw": 1.6, "label": "simulated"}
    left.plot(gpus, [row["clips_per_s"] for row in rows], **style)
    middle.plot(gpus, [100 * row["waiting"] for row in rows], **style)
    right.plot(gpus, [row["mb_a_clip"] for row in rows], **style)
    left.axhline(costs.requests, color="#58a6ff", lw=1, ls="--", label=f"{costs.requests:,.0f} requests a second")
    left.set_yscale("log")
    middle.set_ylim(0, 100)
    middle.yaxis.set_major_formatter("{x:g} %")
    right.set_ylim(0)
    left.legend(frameon=False, fontsize=8, labelcolor=TEXT, loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor=GROUND)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def _dress(axes: Any, title: str, ticks: list[int]) -> None:
    axes.set_facecolor(GROUND)
    axes.set_title(title, color=TEXT, fontsize=10, loc="left")
    axes.set_xlabel("GPUs, eight a machine", color=DIM, fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.tick_params(colors=DIM, labelsize=7)
    axes.grid(color="#1d2630", lw=0.6)
    for side in axes.spines.values():
        side.set_color("#1d2630")
