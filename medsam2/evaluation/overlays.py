"""Pictures that people look at: slices of a case with the outlines of truth and prediction, and the prompt.

One picture an object: a row for each checkpoint, a column for each of up to five slices (the prompted ones and others
spread over the object, one beyond each end), cropped to the neighbourhood of the object.

Legend: T slices or frames, H and W pixels.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medsam2.evaluation.metrics import dice
from medsam2.evaluation.predictor import FramePrompt
from medsam2.evaluation.quick import Row
from medsam2.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUND, TEXT, DIM = "#0b0f14", "#e6edf3", "#8b98a5"
TRUTH, PROMPT = "#34d399", "#38bdf8"
PREDICTIONS = ("#fbbf24", "#f472b6", "#c084fc", "#fb7185")
COLUMNS = 5
PANEL = 2.15  # inches
MARGIN = 0.35  # of the object's side, on each side of it
SMALLEST = 48  # pixels


@dataclass(frozen=True, eq=False)
class Slice:
    """One column: image [h, w] or [h, w, 3], truth and predictions bool [h, w], all cropped at `corner` (x, y)."""

    frame: int
    image: np.ndarray
    truth: np.ndarray
    predictions: dict[str, np.ndarray]
    corner: tuple[int, int]
    prompts: tuple[FramePrompt, ...]


@dataclass(frozen=True, eq=False)
class Picture:
    """What is drawn of one object. scores: DSC by checkpoint. aspect: height over width of a pixel."""

    slices: tuple[Slice, ...]
    scores: dict[str, float]
    aspect: float
    row: Row


class PictureChoice:
    """Which objects of a run get a picture: the first of each group, and the worst of each protocol.

    While cases come one by one, `offered` says whether an object may still be among them; asked in the order of the
    cases, by each rank for its own, the objects that it takes hold all that `chosen` takes in the end.

    Args:
        first: pictures of each protocol, data set, modality and structure. worst: pictures of each protocol.
    """

    def __init__(self, first: int, worst: int) -> None:
        self.first, self.worst = first, worst
        self._seen = Counter[tuple[str, ...]]()
        self._lowest: dict[str, list[float]] = {}

    def offered(self, row: Row, dsc: float) -> bool:
        """Whether to draw the object of `row`; `dsc` is that of the last checkpoint."""
        return self._among_first(row) | self._among_worst(row, dsc)

    def _among_first(self, row: Row) -> bool:
        group = (row.protocol, row.dataset, row.modality, row.structure)
        self._seen[group] += 1
        return self._seen[group] <= self.first

    def _among_worst(self, row: Row, dsc: float) -> bool:
        lowest = self._lowest.setdefault(row.protocol, [])
        place = bisect_right(lowest, dsc)  # of equal scores the first ones: else a failed model would fill the disk
        if place < self.worst:
            lowest.insert(place, dsc)
            del lowest[self.worst :]
        return place < self.worst

    def chosen(self, drawn: Sequence[Drawn]) -> tuple[list[Drawn], list[Drawn]]:
        """Of the pictures drawn, in the order of the cases: the first of each group, and the worst, lowest first."""
        groups = Counter[tuple[str, ...]]()
        first = []
        for one in drawn:
            group = tuple(str(one.row[name]) for name in ("protocol", "dataset", "modality", "structure"))
            groups[group] += 1
            if groups[group] <= self.first:
                first.append(one)
        worst = []
        for protocol in dict.fromkeys(one.row["protocol"] for one in drawn):
            own = [one for one in drawn if one.row["protocol"] == protocol]
            worst += sorted(own, key=lambda one: one.last)[: self.worst]
        return first, worst


@dataclass(frozen=True)
class Drawn:
    """A picture on disk, and what it shows. row: `quick.Row` of its first checkpoint. scores: DSC by checkpoint."""

    path: Path
    row: Mapping[str, Any]
    scores: Mapping[str, float]

    @property
    def last(self) -> float:
        """DSC of the last checkpoint, by which the worst are found."""
        return list(self.scores.values())[-1]

    @property
    def name(self) -> str:
        """A file name that says what is shown."""
        words = (self.row["modality"], self.row["structure"], self.row["dataset"], self.row["case"][:8])
        return f"{'_'.join(_safe(word) for word in words)}_{self.row['object']}.png"


def save(picture: Picture, path: Path) -> None:
    """Draw the picture into a PNG file."""
    figure = draw(picture)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", facecolor=GROUND, dpi=110)
    figure.clear()  # its parts refer to each other, so that it would stay in memory until many more are drawn


def make_picture(
    frames: np.ndarray,
    spacing: tuple[float, float, float],
    truth: np.ndarray,
    predictions: dict[str, np.ndarray],
    prompts: tuple[FramePrompt, ...],
    scores: dict[str, float],
    row: Row,
) -> Picture:
    """Choose the slices and the crop, and copy just them.

    Args:
        frames: uint8 [T, C, H, W]. truth, predictions: bool [T, H, W].
    """
    chosen = choose_slices(truth, tuple(sorted({p.frame for p in prompts})))
    shown = [truth[t] for t in chosen] + [mask[t] for mask in predictions.values() for t in chosen]
    top, bottom, left, right = _crop(np.logical_or.reduce(shown), np.asarray(truth.any(0)))
    slices = []
    for t in chosen:
        image = np.moveaxis(frames[t], 0, -1)[top:bottom, left:right]
        slices.append(
            Slice(
                frame=t,
                image=np.array(image[..., 0] if image.shape[-1] == 1 else image),
                truth=np.array(truth[t, top:bottom, left:right]),
                predictions={name: np.array(mask[t, top:bottom, left:right]) for name, mask in predictions.items()},
                corner=(left, top),
                prompts=tuple(p for p in prompts if p.frame == t),
            )
        )
    return Picture(tuple(slices), scores, spacing[1] / spacing[2], row)


def choose_slices(truth: np.ndarray, prompted: tuple[int, ...], count: int = COLUMNS) -> tuple[int, ...]:
    """Up to `count` frames in order: the prompted ones, and others spread from before the object to behind it."""
    present = np.flatnonzero(truth.any((1, 2)))
    first, last = max(int(present[0]) - 1, 0), min(int(present[-1]) + 1, len(truth) - 1)
    chosen = set(prompted[:count])
    for end in (first, last):
        if len(chosen) < count:
            chosen.add(end)
    while len(chosen) < count:  # halve the widest gap
        order = sorted(chosen)
        width, start = max(((b - a, -a) for a, b in zip(order, order[1:], strict=False)), default=(0, 0))
        if width < 2:
            break
        chosen.add(-start + width // 2)
    return tuple(sorted(chosen))


def _crop(shown: np.ndarray, truth: np.ndarray) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) around the object, wider where a prediction strays, at most the whole picture."""
    rows, columns = np.flatnonzero(truth.any(1)), np.flatnonzero(truth.any(0))
    side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    reach = int(side * (0.5 + MARGIN))
    if shown.sum() > 1.3 * truth.sum():
        reach = int(side * (0.5 + 2.5 * MARGIN))
    reach = max(reach, SMALLEST // 2)
    return (*_span(rows, reach, truth.shape[0]), *_span(columns, reach, truth.shape[1]))


def _span(where: np.ndarray, reach: int, length: int) -> tuple[int, int]:
    centre = int(where[0] + where[-1]) // 2
    start = max(min(centre - reach, length - 2 * reach), 0)
    return start, min(start + 2 * reach, length)


# ------------------------------------------------------------------------------------------------------- drawing


def draw(picture: Picture) -> Figure:
    """The figure, on a dark ground."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    height, width = picture.slices[0].truth.shape
    tall = PANEL * min(max(height * picture.aspect / width, 0.5), 1.6)
    rows, columns = len(picture.scores), len(picture.slices)
    size = (1.55 + columns * (PANEL + 0.06), 0.72 + rows * (tall + 0.06) + 0.4)
    figure = Figure(figsize=size, facecolor=GROUND)
    axes = figure.subplots(
        rows, columns, squeeze=False,
        gridspec_kw={"left": 1.5 / size[0], "right": 1 - 0.05 / size[0], "top": 1 - 0.72 / size[1],
                     "bottom": 0.4 / size[1], "wspace": 0.03, "hspace": 0.03},
    )  # fmt: skip
    for line, (label, score) in enumerate(picture.scores.items()):
        colour = PREDICTIONS[line % len(PREDICTIONS)]
        for column, shown in enumerate(picture.slices):
            _panel(axes[line, column], shown, label, colour, picture.aspect)
            if line == 0:
                what = "slice" if picture.row.kind == "volume" else "frame"
                _title(axes[line, column], shown, "" if column else f"{what} ")
        box = axes[line, 0].get_position()
        middle = (box.y0 + box.y1) / 2
        for text, offset, side, points in (
            (_short(label), 0.08, "bottom", 10),
            (f"{score:.3f}", 0.04, "top", 15),
            ("DSC, whole case", -0.27, "top", 7),
        ):
            figure.text(
                1.4 / size[0], middle + offset / size[1], text, ha="right", va=side, fontsize=points,
                color=colour if points > 7 else DIM, fontweight="bold" if points > 7 else "normal",
            )  # fmt: skip
    row = picture.row
    corner = (0.12 / size[0], 1 - 0.16 / size[1])
    figure.text(*corner, row.structure, color=TEXT, fontsize=15, fontweight="bold", va="top")
    figure.text(
        1 - 0.05 / size[0], 1 - 0.2 / size[1], f"{row.modality}   {row.dataset}   case {row.case[:8]}   {row.protocol}",
        color=DIM, fontsize=8.5, va="top", ha="right",
    )  # fmt: skip
    handles = [Line2D([], [], color=TRUTH, lw=2, label="ground truth")]
    handles += [
        Line2D([], [], color=PREDICTIONS[i % len(PREDICTIONS)], lw=2, label=_short(label, 40))
        for i, label in enumerate(picture.scores)
    ]
    handles.append(Line2D([], [], color=PROMPT, lw=1.5, ls="--", label="prompt"))
    figure.legend(
        handles=handles, loc="lower right", ncols=len(handles), frameon=False, labelcolor=TEXT, fontsize=8.5,
        bbox_to_anchor=(1, 0), borderaxespad=0.3,
    )  # fmt: skip
    return figure


def _panel(axes: Axes, shown: Slice, label: str, colour: str, aspect: float) -> None:
    axes.set_facecolor(GROUND)
    axes.set_axis_off()
    axes.imshow(shown.image, cmap="gray", vmin=0, vmax=255, aspect=aspect, interpolation="nearest")
    axes.autoscale(False)
    prediction = shown.predictions[label]
    _fill(axes, prediction, colour, aspect)
    _outline(axes, shown.truth, TRUTH, 1.5)
    _outline(axes, prediction, colour, 1.5)
    for prompt in shown.prompts:
        _prompt(axes, prompt, shown.corner)
    value = "absent" if not shown.truth.any() and not prediction.any() else f"{dice(prediction, shown.truth):.2f}"
    axes.text(
        0.97, 0.03, value, transform=axes.transAxes, ha="right", va="bottom", color=TEXT, fontsize=8,
        bbox={"facecolor": GROUND, "alpha": 0.65, "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip


def _title(axes: Axes, shown: Slice, what: str) -> None:
    if shown.prompts:
        axes.set_title(f"{what}{shown.frame}  prompt", color=PROMPT, fontsize=9, pad=3, fontweight="bold")
    else:
        axes.set_title(f"{what}{shown.frame}", color=DIM, fontsize=9, pad=3)


def _outline(axes: Axes, mask: np.ndarray, colour: str, width: float) -> None:
    """Along the pixels' edges: what is inside is exactly what was scored."""
    from matplotlib.collections import LineCollection

    lines = LineCollection(list(pixel_edges(mask)), colors=colour, linewidths=width, capstyle="projecting")
    axes.add_collection(lines, autolim=False)


def pixel_edges(mask: np.ndarray) -> np.ndarray:
    """The sides of pixels between inside and outside, as lines from (x, y) to (x, y): [S, 2, 2]."""
    padded = np.pad(mask, 1).astype(np.int8)
    y, x = np.nonzero(np.diff(padded[:, 1:-1], axis=0))
    lying = np.stack([x - 0.5, y - 0.5, x + 0.5, y - 0.5], -1)
    y, x = np.nonzero(np.diff(padded[1:-1], axis=1))
    standing = np.stack([x - 0.5, y - 0.5, x - 0.5, y + 0.5], -1)
    return np.concatenate([lying, standing]).reshape(-1, 2, 2)


def _fill(axes: Axes, mask: np.ndarray, colour: str, aspect: float) -> None:
    from matplotlib.colors import to_rgba_array

    layer = np.zeros((*mask.shape, 4), np.uint8)
    layer[mask] = (255 * to_rgba_array(colour, 0.18)[0]).astype(np.uint8)
    axes.imshow(layer, aspect=aspect, interpolation="nearest")


def _prompt(axes: Axes, prompt: FramePrompt, corner: tuple[int, int]) -> None:
    from matplotlib.patches import Rectangle

    if prompt.box is not None:
        x0, y0, x1, y1 = prompt.box
        place = (x0 - corner[0] - 0.5, y0 - corner[1] - 0.5)  # from the outer edges of the outermost pixels
        axes.add_patch(Rectangle(place, x1 - x0 + 1, y1 - y0 + 1, fill=False, ec=PROMPT, lw=1.2, ls=(0, (4, 3))))
    if prompt.points is not None and prompt.labels is not None:
        for (x, y), label in zip(prompt.points, prompt.labels, strict=True):
            marker = "P" if label == 1 else "X"
            axes.plot(x - corner[0], y - corner[1], marker, color=PROMPT, ms=8, mec=GROUND, mew=1)
    if prompt.mask is not None:
        mask = prompt.mask[corner[1] :, corner[0] :]
        axes.contour(mask.astype(float), levels=[0.5], colors=[PROMPT], linewidths=1.0, linestyles="dashed")


def _short(label: str, most: int = 16) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-" else "-" for letter in name)
