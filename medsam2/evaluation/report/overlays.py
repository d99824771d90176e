"""Pictures of an evaluation: slices of a case with outlines of ground truth and prediction, and the prompts.

One picture per object, with one strip per checkpoint. A strip has up to five slices (the prompted ones and others
spread over the object, one beyond each end), cropped to the surroundings of the object.

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

from medsam2.evaluation.loaded_case import LoadedCase
from medsam2.evaluation.metrics.metrics import dice
from medsam2.evaluation.run.score_case import ObjectPrediction, Row
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

WIDE_MARGIN_SHARE = 2.5 * MARGIN_SHARE  # of the object's side, for masks that cover much more than the object
WIDE_MARGIN_AREA_RATIO = 1.3  # of all masks to the object, above which the margin is wide
SINGLE_FRAME_SIDE_PX = 360


class PictureSelection:
    """Selects the objects that get a picture: the first of each group, and the worst of each protocol.

    While cases arrive, `may_select` tells whether an object can still be selected. Each rank calls it for its cases in
    order; together the objects that it accepts contain all that `select` returns at the end.

    Args:
        first: pictures of each protocol, data set, modality and structure. worst: pictures of each protocol.
    """

    def __init__(self, first: int, worst: int) -> None:
        self.first, self.worst = first, worst
        self._group_counts = Counter[tuple[str, ...]]()
        self._lowest: dict[str, list[float]] = {}

    def may_select(self, row: Row, dsc: float) -> bool:
        """Whether to draw the object of `row`; `dsc` is the score of the last checkpoint."""
        return self._is_first(vars(row), self._group_counts) | self._is_low(row, dsc)

    def _is_first(self, row: Mapping[str, Any], counts: Counter[tuple[str, ...]]) -> bool:
        group = tuple(str(row[name]) for name in ("protocol", "dataset", "modality", "structure"))
        counts[group] += 1
        return counts[group] <= self.first

    def _is_low(self, row: Row, dsc: float) -> bool:
        lowest = self._lowest.setdefault(row.protocol, [])
        # Of equal scores only the first ones are drawn; otherwise a model that scores 0 everywhere would fill the disk
        place = bisect_right(lowest, dsc)
        if place < self.worst:
            lowest.insert(place, dsc)
            del lowest[self.worst :]
        return place < self.worst

    def select(self, drawn: Sequence[DrawnPicture]) -> tuple[list[DrawnPicture], list[DrawnPicture]]:
        """Select from pictures in the order of the cases: the first of each group, and the worst, lowest DSC first."""
        counts = Counter[tuple[str, ...]]()
        first = [picture for picture in drawn if self._is_first(picture.row, counts)]
        worst = []
        for protocol in dict.fromkeys(picture.row["protocol"] for picture in drawn):
            pictures = [picture for picture in drawn if picture.row["protocol"] == protocol]
            worst += sorted(pictures, key=lambda picture: picture.last_dsc)[: self.worst]
        return first, worst


@dataclass(frozen=True)
class DrawnPicture:
    """A picture file and its object. row: `score_case.Row` of the first checkpoint. scores: DSC by checkpoint."""

    file: Path
    row: dict[str, Any]
    scores: dict[str, float]

    @property
    def last_dsc(self) -> float:
        """DSC of the last checkpoint, which ranks the worst pictures."""
        return list(self.scores.values())[-1]

    @property
    def file_name(self) -> str:
        """A descriptive file name: modality, structure, dataset, case and object."""
        parts = (self.row["modality"], self.row["structure"], self.row["dataset"], self.row["case"][:8])
        return "_".join(re.sub(r"[\W_]", "-", part) for part in parts) + f"_{self.row['object']}.png"


def draw_picture(case: LoadedCase, predictions: Sequence[ObjectPrediction], path: Path) -> DrawnPicture:
    """Draw one object of a case, as each checkpoint predicted it, to a PNG file; the result has its name only."""
    with atomic_write(path) as file:
        file.write(encode(_make_picture(case, predictions), "PNG"))
    dsc = {prediction.row.checkpoint: prediction.row.dsc for prediction in predictions}
    return DrawnPicture(Path(path.name), vars(predictions[0].row), dsc)


def _make_picture(case: LoadedCase, predictions: Sequence[ObjectPrediction]) -> Image.Image:
    row, truth, prompts = predictions[0].row, predictions[0].truth, predictions[0].prompts
    frames, masks = case.frames.numpy(), {p.row.checkpoint: p.prediction for p in predictions}
    indices = choose_frames(truth, sorted({prompt.frame for prompt in prompts}))
    covered = np.logical_or.reduce([mask[t] for mask in (truth, *masks.values()) for t in indices])
    area = np.asarray(truth.any(0))
    wide = covered.sum() > WIDE_MARGIN_AREA_RATIO * area.sum()
    crop = crop_around(area, WIDE_MARGIN_SHARE if wide else MARGIN_SHARE)
    strips = []
    colours = {label: prediction_colour(place) for place, label in enumerate(masks)}
    noun = {"volume": "slice", "clip": "frame"}.get(row.kind, "")
    for prediction in predictions:
        label = prediction.row.checkpoint
        panels = object_frames(frames, truth, masks[label], prompts, indices, crop, colours[label], noun)
        detail = f"DSC, whole {row.kind}" if noun else "DSC"
        strips.append(Strip(panels, label, f"{prediction.row.dsc:.3f}", detail, colours[label]))
    legend = [("ground truth", TRUTH), *colours.items(), ("prompt", PROMPT)]
    subtitle = f"{row.modality}, {row.dataset}, case {row.case[:8]}, {row.protocol}"
    side = FRAME_SIDE if len(indices) > 1 else SINGLE_FRAME_SIDE_PX
    return draw_sheet(strips, row.structure, subtitle, legend, side, case.spacing[1] / case.spacing[2])


def object_frames(
    frames: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    prompts: Sequence[FramePrompt],
    indices: Sequence[int],
    crop: tuple[slice, slice],
    colour: str,
    noun: str = "",
) -> tuple[Frame, ...]:
    """Prepare the frames `indices` for drawing: outlines of truth and prediction, prompts, and the DSC in a corner.

    Args:
        frames: uint8 [T, C, H, W]. truth, prediction: bool [T, H, W]. crop: rows and columns.
        noun: "slice" or "frame" for the titles; if empty, only prompted frames have a title.
    """
    panels = []
    for t in indices:
        image = np.moveaxis(frames[t], 0, -1)[crop]
        outlines = [Outline(truth[t][crop], TRUTH), Outline(prediction[t][crop], colour, filled=True)]
        points: list[tuple[float, float, bool]] = []
        frame_prompts = [prompt for prompt in prompts if prompt.frame == t]
        for prompt in frame_prompts:
            mask = prompt.mask if prompt.box is None else box_outline(truth.shape[1:], prompt.box).mask
            if mask is not None:
                outlines.append(Outline(mask[crop], PROMPT, dashed=True))
            if prompt.points is not None and prompt.labels is not None:
                places = prompt.points - (crop[1].start, crop[0].start)
                points += [(x, y, label == 1) for (x, y), label in zip(places, prompt.labels, strict=True)]
        absent = not truth[t].any() and not prediction[t].any()
        title = " ".join(word for word in (noun, str(t) if noun else "", "prompt" if frame_prompts else "") if word)
        panels.append(
            Frame(
                image[..., 0] if image.shape[-1] == 1 else image, tuple(outlines), tuple(points), title,
                "absent" if absent else f"{dice(prediction[t], truth[t]):.2f}",
            )
        )  # fmt: skip
    return tuple(panels)
