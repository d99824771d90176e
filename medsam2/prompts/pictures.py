"""A picture of every kind of prompt on one made-up object: `python -m medsam2.prompts.pictures prompts.png`."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from medsam2.prompts.initial import initial_kinds
from medsam2.prompts.kinds import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NEGATIVE, POSITIVE, Prompts
from medsam2.prompts.randomness import uniform
from medsam2.prompts.scene import other_objects
from medsam2.prompts.settings import PointSettings, PromptSettings
from medsam2.prompts.simulate import correction_click, dense_prompts, initial_prompts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = 192  # pixels of the made-up picture
COLUMNS, PANEL = 5, 2.3  # inches
GROUND, TEXT, DIM = "#0b0f14", "#e6edf3", "#8b98a5"
OBJECT, OUTSIDE, INSIDE, GUESS = "#34d399", "#f87171", "#38bdf8", "#fbbf24"
LINES = ("recist", "scribble")
SETTINGS = PromptSettings(click_candidates=3, points=PointSettings(positives=(3, 3), negatives=(3, 3)))


@dataclass(frozen=True, eq=False)
class Panel:
    """One kind: its prompts for the first object, a mask [S, S] to fill or None, and whether its points are a line."""

    name: str
    prompts: Prompts | None = None
    filled: Tensor | None = None
    colour: str = INSIDE
    joined: bool = False


def example_objects() -> Tensor:
    """Two neighbours, the first one bent: bool [2, SIZE, SIZE]."""
    grid = (torch.arange(SIZE) + 0.5) / SIZE
    y, x = torch.meshgrid(grid, grid, indexing="ij")

    def blob(cx: float, cy: float, radius: float, waves: tuple[tuple[int, float, float], ...]) -> Tensor:
        angle = torch.atan2(y - cy, x - cx)
        edge = 1 + sum(share * torch.cos(number * angle + phase) for number, share, phase in waves)
        return torch.hypot(x - cx, y - cy) < radius * edge

    first = blob(0.42, 0.52, 0.29, ((2, 0.3, 0.7), (3, 0.22, 1.9), (5, 0.04, 0.3)))
    return torch.stack([first, blob(0.86, 0.33, 0.13, ((2, 0.15, 2.0), (3, 0.08, 0.5))) & ~first])


def example_picture(masks: Tensor) -> Tensor:
    """A grey picture [S, S] in 0..1 in which the objects stand out a little."""
    noise = uniform(torch.arange(SIZE), 1, SIZE)[None, None] - 0.5
    noise = F.avg_pool2d(F.pad(noise, (2, 2, 2, 2), mode="reflect"), 5, 1)
    body = 0.28 + 0.22 * masks[0].float() + 0.16 * masks[1].float()
    body = F.avg_pool2d(body[None, None], 5, 1, 2, count_include_pad=False)
    return (body + 0.9 * noise)[0, 0].clamp(0, 1)


def panels(masks: Tensor, seed: int, settings: PromptSettings = SETTINGS) -> list[Panel]:
    """Every registered kind, the damaged mask, and a correction of a wrong guess."""
    seeds = torch.tensor([seed, seed + 1])
    others = other_objects(masks, torch.zeros(2, dtype=torch.int64), 1)
    found = []
    for name in initial_kinds():
        prompts = initial_prompts(masks, name, seeds, 0, settings, others)
        filled = masks[0] if prompts.masks is not None else None
        found.append(Panel(name, prompts, filled, joined=name in LINES))
    _, logits = dense_prompts(masks, (SIZE // 4, SIZE // 4), seeds, 0)
    damaged = F.interpolate(logits, (SIZE, SIZE), mode="nearest")[0, 0] > 0
    found.append(Panel("mask, damaged", filled=damaged))
    guess = masks.roll((18, 13), (1, 2))
    clicks = [correction_click(guess, masks, seeds, 0, step, settings.model_copy(update={"from_truth": 0.0}))
              for step in range(4)]  # fmt: skip
    corrections = Prompts(torch.cat([p for p, _ in clicks], 1), torch.cat([k for _, k in clicks], 1))
    return [*found, Panel("corrections of a guess", corrections, guess[0], GUESS)]


def prompt_sheet(seed: int = 20) -> bytes:
    """PNG of all kinds side by side; the object is outlined in green."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    masks = example_objects()
    picture, shown = example_picture(masks), panels(masks, seed)
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * PANEL, rows * (PANEL + 0.3)), facecolor=GROUND, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, panel in zip(axes, shown, strict=False):
        _draw(axis, picture, masks, panel)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw(axis: Axes, picture: Tensor, masks: Tensor, panel: Panel) -> None:
    axis.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    if panel.filled is not None:
        axis.contourf(panel.filled.float().numpy(), levels=[0.5, 1.5], colors=[panel.colour], alpha=0.4)
    for mask, colour, width in ((masks[0], OBJECT, 1.3), (masks[1], DIM, 1.0)):
        axis.contour(mask.float().numpy(), levels=[0.5], colors=[colour], linewidths=width)
    axis.set_title(panel.name, color=TEXT, fontsize=10)
    prompts = panel.prompts
    if prompts is None or prompts.points is None or prompts.labels is None:
        return
    points, labels = prompts.points[0], prompts.labels[0]
    if panel.joined:
        line = points[labels == POSITIVE]
        order = line[:, 0].argsort() if panel.name == "recist" else torch.arange(len(line))
        axis.plot(*line[order].T.numpy(), color=INSIDE, linewidth=1.6)
    corners = points[(labels == BOX_TOP_LEFT) | (labels == BOX_BOTTOM_RIGHT)]
    if len(corners):
        (x0, y0), (x1, y1) = corners.tolist()
        axis.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color=INSIDE, linewidth=1.8)
    for sign, colour, marker in ((POSITIVE, INSIDE, "o"), (NEGATIVE, OUTSIDE, "X")):
        x, y = points[labels == sign].T.numpy()
        axis.scatter(x, y, c=colour, marker=marker, s=46, edgecolors="white", zorder=3)


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(prompt_sheet())
