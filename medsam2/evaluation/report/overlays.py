"""Pictures of an evaluation: slices of a case with the outlines of truth and prediction, and the prompt.

One picture an object: a strip for each checkpoint, in it up to five slices (the prompted ones and others spread over
the object, one beyond each end), cropped to the neighbourhood of the object.

Legend: T slices or frames, C channels, H and W pixels.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medsam2.evaluation.metrics.metrics import dice
from medsam2.evaluation.run.score_case import LoadedCase, Predicted, Row
from medsam2.files import atomic_write
from medsam2.inference.predictor import FramePrompt
from medsam2.reporting.overlays import (
    FRAME_SIDE,
    MARGIN_SHARE,
    Frame,
    Outline,
    Strip,
    box_outline,
    choose_frames,
    crop_around,
    draw_sheet,
    encode,
)
from medsam2.reporting.style import PROMPT, TRUTH, prediction_colour

STRAY_MARGIN_SHARE = 2.5 * MARGIN_SHARE  # of the object's side, where masks cover much more than the object
STRAY_AREA = 1.3  # times the object's area
LONE_FRAME_SIDE = 360  # pixels


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
        return self._is_first(vars(row), self._seen) | self._is_low(row, dsc)

    def _is_first(self, row: Mapping[str, Any], seen: Counter[tuple[str, ...]]) -> bool:
        group = tuple(str(row[name]) for name in ("protocol", "dataset", "modality", "structure"))
        seen[group] += 1
        return seen[group] <= self.first

    def _is_low(self, row: Row, dsc: float) -> bool:
        lowest = self._lowest.setdefault(row.protocol, [])
        place = bisect_right(lowest, dsc)  # of equal scores the first ones: else a failed model would fill the disk
        if place < self.worst:
            lowest.insert(place, dsc)
            del lowest[self.worst :]
        return place < self.worst

    def chosen(self, drawn: Sequence[Drawn]) -> tuple[list[Drawn], list[Drawn]]:
        """Of the pictures drawn, in the order of the cases: the first of each group, and the worst, lowest first."""
        seen = Counter[tuple[str, ...]]()
        first = [picture for picture in drawn if self._is_first(picture.row, seen)]
        worst = []
        for protocol in dict.fromkeys(picture.row["protocol"] for picture in drawn):
            pictures = [picture for picture in drawn if picture.row["protocol"] == protocol]
            worst += sorted(pictures, key=lambda picture: picture.last)[: self.worst]
        return first, worst


@dataclass(frozen=True)
class Drawn:
    """A picture on disk, and what it shows. row: `quick.Row` of its first checkpoint. scores: DSC by checkpoint."""

    file: Path
    row: dict[str, Any]
    scores: dict[str, float]

    @property
    def last(self) -> float:
        """DSC of the last checkpoint, by which the worst are found."""
        return list(self.scores.values())[-1]

    @property
    def name(self) -> str:
        """A file name that says what is shown."""
        parts = (self.row["modality"], self.row["structure"], self.row["dataset"], self.row["case"][:8])
        return "_".join(re.sub(r"[\W_]", "-", part) for part in parts) + f"_{self.row['object']}.png"


def save(picture: Image.Image, path: Path) -> None:
    """Write the picture as a PNG file."""
    with atomic_write(path) as file:
        file.write(encode(picture, "PNG"))


def make_picture(case: LoadedCase, seen: Sequence[Predicted]) -> Image.Image:
    """The picture of one object of a case, as each checkpoint predicted it."""
    row, truth, prompts = seen[0].row, seen[0].truth, seen[0].prompts
    frames, predictions = case.frames.numpy(), {p.row.checkpoint: p.prediction for p in seen}
    shown = choose_frames(truth, sorted({prompt.frame for prompt in prompts}))
    masks = np.logical_or.reduce([mask[t] for mask in (truth, *predictions.values()) for t in shown])
    area = np.asarray(truth.any(0))
    crop = crop_around(area, STRAY_MARGIN_SHARE if masks.sum() > STRAY_AREA * area.sum() else MARGIN_SHARE)
    strips = []
    colours = {label: prediction_colour(place) for place, label in enumerate(predictions)}
    noun = {"volume": "slice", "clip": "frame"}.get(row.kind, "")
    for label, score in scores_of(seen).items():
        panels = object_frames(frames, truth, predictions[label], prompts, shown, crop, colours[label], noun)
        detail = f"DSC, whole {row.kind}" if noun else "DSC"
        strips.append(Strip(panels, label, f"{score:.3f}", detail, colours[label]))
    legend = [("ground truth", TRUTH), *colours.items(), ("prompt", PROMPT)]
    subtitle = f"{row.modality}, {row.dataset}, case {row.case[:8]}, {row.protocol}"
    side = FRAME_SIDE if len(shown) > 1 else LONE_FRAME_SIDE
    return draw_sheet(strips, row.structure, subtitle, legend, side, case.spacing[1] / case.spacing[2])


def scores_of(seen: Sequence[Predicted]) -> dict[str, float]:
    """DSC of the whole case by checkpoint."""
    return {p.row.checkpoint: p.row.dsc for p in seen}


def object_frames(
    frames: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    prompts: Sequence[FramePrompt],
    shown: Sequence[int],
    crop: tuple[slice, slice],
    colour: str,
    noun: str = "",
) -> tuple[Frame, ...]:
    """The frames `shown` with outlines of truth and prediction, the prompts, and in a corner the DSC of each.

    Args:
        frames: uint8 [T, C, H, W]. truth, prediction: bool [T, H, W]. crop: rows and columns.
        noun: what a frame is called above it; without one only prompted frames have a title.
    """
    panels = []
    for t in shown:
        image = np.moveaxis(frames[t], 0, -1)[crop]
        outlines = [Outline(truth[t][crop], TRUTH), Outline(prediction[t][crop], colour, filled=True)]
        points: list[tuple[float, float, bool]] = []
        here = [prompt for prompt in prompts if prompt.frame == t]
        for prompt in here:
            mask = prompt.mask if prompt.box is None else box_outline(truth.shape[1:], prompt.box).mask
            if mask is not None:
                outlines.append(Outline(mask[crop], PROMPT, dashed=True))
            if prompt.points is not None and prompt.labels is not None:
                places = prompt.points - (crop[1].start, crop[0].start)
                points += [(x, y, label == 1) for (x, y), label in zip(places, prompt.labels, strict=True)]
        absent = not truth[t].any() and not prediction[t].any()
        title = " ".join(word for word in (noun, str(t) if noun else "", "prompt" if here else "") if word)
        panels.append(
            Frame(
                image[..., 0] if image.shape[-1] == 1 else image, tuple(outlines), tuple(points), title,
                "absent" if absent else f"{dice(prediction[t], truth[t]):.2f}",
            )
        )  # fmt: skip
    return tuple(panels)
