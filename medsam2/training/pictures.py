"""Overlays of a few fixed validation clips at each validation: `pictures/` in the run folder, and the loggers.

One clip of each modality and structure: the frames around the slice where its first object is largest, prompted there
by a box and tracked both ways. Always the same frames, prompt and crop, so that steps compare; it costs a few frames,
not whole cases. On disk the first, the best and the last validation are kept.

Legend: T frames of the clip, H and W pixels.
"""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from medsam2.evaluation.metrics import dice
from medsam2.evaluation.overlays import MARGIN, PREDICTIONS, PROMPT, SMALLEST, TRUTH, choose_slices
from medsam2.evaluation.predictor import FramePrompt, Predictor
from medsam2.files import atomic_write
from medsam2.model.tracker import Tracker
from medsam2.prompts.strategies import tight_box
from medsam2.training.loggers.registry import TakesPictures
from medsam2.training.retention import ValidationCase
from medsam2.training.validation import gather_rows

FOLDER, TABLE = "pictures", "pictures.csv"
FRAMES = 9  # of a clip
SIDE = 224  # pixels of a panel, the longer side
GAP = 4


@dataclass(frozen=True, order=True)
class Candidate:
    """An object that may get a picture; the order is that of choice. case: a salted hash."""

    general: bool
    modality: str
    structure: str
    dataset: str
    case: str
    object: int

    @property
    def group(self) -> tuple[str, str]:
        return self.modality, self.structure


@dataclass(frozen=True, order=True)
class Shown:
    """A picture of one object. dsc: over the frames of its clip. webp: the file's content."""

    modality: str
    structure: str
    case: str
    object: int
    dsc: float
    frames: int
    webp: bytes

    @property
    def name(self) -> str:
        """A file name that says what is shown."""
        words = f"{self.modality}_{self.structure}_{self.case[:8]}_{self.object}"
        return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in words)

    @property
    def caption(self) -> str:
        many = "a still" if self.frames == 1 else f"{self.frames} frames"
        return f"{self.modality} {self.structure}, case {self.case[:8]}: DSC {self.dsc:.3f} ({many})"


@dataclass(frozen=True)
class Kept:
    """A line of pictures.csv. file: below the folder of pictures. score: the mean DSC of that validation."""

    step: int
    file: str
    modality: str
    structure: str
    case: str
    object: int
    frames: int
    dsc: float
    score: float


# ------------------------------------------------------------------------------------------------------- choice


def candidates(cases: Iterable[ValidationCase]) -> list[Candidate]:
    """All objects of this rank's cases."""
    return [
        Candidate(not entry.own, entry.case.modality, found.name, entry.case.dataset, entry.case.case, number)
        for entry in cases
        for number, found in enumerate(entry.case.objects)
    ]


def choose(found: Iterable[Candidate], limit: int) -> list[Candidate]:
    """The first of each modality and structure, modalities in turn, at most `limit`; the same for any ranks."""
    first: dict[tuple[str, str], Candidate] = {}
    for one in sorted(found):
        first.setdefault(one.group, one)
    turns: dict[str, int] = {}
    ranked = []
    for one in first.values():
        turns[one.modality] = turns.get(one.modality, 0) + 1
        ranked.append((turns[one.modality], one))
    return [one for _, one in sorted(ranked)[:limit]]


# ------------------------------------------------------------------------------------------------------- drawing


def picture(tracker: Tracker, entry: ValidationCase, one: Candidate) -> Shown:
    """Predict the clip of an object, and draw it."""
    case = entry.case
    whole = case.mask(one.object)
    largest = int(whole.sum((1, 2)).argmax())
    start = max(min(largest - FRAMES // 2, len(whole) - FRAMES), 0)
    truth, frames = whole[start : start + FRAMES], case.frames[start : start + FRAMES]
    prompt = FramePrompt(largest - start, 0, box=tight_box(truth[largest - start]))
    predicted = Predictor(tracker).predict(frames, [prompt], "both").masks[0].numpy()
    content = strip(frames, truth, predicted, prompt, case.spacing[1] / case.spacing[2])
    score = float(dice(predicted, truth))
    return Shown(one.modality, one.structure, one.case, one.object, score, len(truth), content)


def strip(frames: Tensor, truth: np.ndarray, predicted: np.ndarray, prompt: FramePrompt, aspect: float) -> bytes:
    """Up to five frames side by side as WebP: outlines of truth and prediction, the box, and each frame's DSC.

    Args:
        frames: uint8 [T, C, H, W]. truth, predicted: bool [T, H, W]. aspect: height over width of a pixel.
    """
    from PIL import Image

    rows, columns = crop(truth)
    height, width = panel_size(rows.stop - rows.start, columns.stop - columns.start, aspect)
    panels = []
    for t in choose_slices(truth, (prompt.frame,)):
        image = np.moveaxis(frames[t].numpy(), 0, -1)[rows, columns]
        image = image.repeat(3, -1) if image.shape[-1] == 1 else image
        panel = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_LINEAR)
        outline(panel, truth[t, rows, columns], TRUTH)
        outline(panel, predicted[t, rows, columns], PREDICTIONS[0])
        if t == prompt.frame and prompt.box is not None:
            draw_box(panel, prompt.box, (columns.start, rows.start), width / (columns.stop - columns.start),
                     height / (rows.stop - rows.start))  # fmt: skip
        write_score(panel, truth[t], predicted[t])
        panels += [panel, np.full((height, GAP, 3), 11, np.uint8)]
    content = io.BytesIO()
    Image.fromarray(np.concatenate(panels[:-1], 1)).save(content, "WEBP", quality=80)
    return content.getvalue()


def crop(truth: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns around the object on all frames; they follow from the truth alone, so that steps compare."""
    shown = np.logical_or.reduce(truth)
    found = []
    side = max(int(np.ptp(np.flatnonzero(shown.any(axis)))) + 1 for axis in (0, 1))
    reach = max(int(side * (0.5 + MARGIN)), SMALLEST // 2)
    for axis, length in ((1, shown.shape[0]), (0, shown.shape[1])):
        where = np.flatnonzero(shown.any(axis))
        start = max(min(int(where[0] + where[-1]) // 2 - reach, length - 2 * reach), 0)
        found.append(slice(start, min(start + 2 * reach, length)))
    return found[0], found[1]


def panel_size(height: int, width: int, aspect: float) -> tuple[int, int]:
    """(height, width) of a panel whose longer side has `SIDE` pixels; no thinner than a third."""
    tall = min(max(height * aspect / width, 1 / 3), 3.0)
    return (SIDE, round(SIDE / tall)) if tall > 1 else (round(SIDE * tall), SIDE)


def outline(panel: np.ndarray, mask: np.ndarray, colour: str) -> None:
    fine = cv2.resize(mask.astype(np.uint8), panel.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(fine, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(panel, contours, -1, rgb(colour), 1, cv2.LINE_AA)


def draw_box(panel: np.ndarray, box: Any, corner: tuple[int, int], wide: float, tall: float) -> None:
    x0, y0, x1, y1 = (float(value) for value in box)
    first = round((x0 - corner[0]) * wide), round((y0 - corner[1]) * tall)
    last = round((x1 + 1 - corner[0]) * wide), round((y1 + 1 - corner[1]) * tall)
    cv2.rectangle(panel, first, last, rgb(PROMPT), 1, cv2.LINE_AA)


def write_score(panel: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> None:
    text = "absent" if not truth.any() and not predicted.any() else f"{dice(predicted, truth):.2f}"
    place = (6, panel.shape[0] - 8)
    for colour, thick in (((11, 15, 20), 3), ((230, 237, 243), 1)):
        cv2.putText(panel, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, thick, cv2.LINE_AA)


def rgb(colour: str) -> tuple[int, int, int]:
    """`#34d399` -> (52, 211, 153)."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


# ------------------------------------------------------------------------------------------------------ the run


class Pictures(Callback):
    """Draws after each validation.

    It stands before the moving average of the weights, whose figures the validation has, too.

    Args:
        folder: the run folder. limit: at most so many clips. resumed_step: pictures of later steps are dropped.
    """

    def __init__(self, folder: Path, limit: int, resumed_step: int | None = None) -> None:
        self.folder, self.limit, self.resumed_step = folder / FOLDER, limit, resumed_step
        self.chosen: list[Candidate] | None = None
        self.shown: list[Shown] = []

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Every rank draws those of its own cases; rank 0 gets all of them."""
        data = getattr(trainer, "datamodule", None)
        entries: Sequence[ValidationCase] = getattr(data, "validation_cases", ())
        if self.chosen is None:
            self.chosen = choose(gather_rows(candidates(entries)), self.limit)
        mine = []
        for one in self.chosen:
            entry = next((e for e in entries if (e.case.dataset, e.case.case) == (one.dataset, one.case)), None)
            if entry is not None:
                mine.append(picture(pl_module.tracker, entry, one))
        everywhere = {(shown.modality, shown.structure): shown for shown in gather_rows(mine)}
        self.shown = [everywhere[one.group] for one in self.chosen if one.group in everywhere]

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """When the means are known: keep the files, and hand the pictures to the loggers."""
        if not self.shown:
            return
        step = trainer.global_step
        score = float(trainer.callback_metrics.get("val/dsc", float("nan")))
        rows = write_pictures(self.folder, self.shown, step, score, self.resumed_step)
        prune(self.folder, rows)
        self.resumed_step = None
        for logger in trainer.loggers:
            if isinstance(logger, TakesPictures):
                logger.log_pictures(self.shown, step)


def write_pictures(
    folder: Path, shown: Sequence[Shown], step: int, score: float, resumed_step: int | None = None
) -> list[Kept]:
    """Write the pictures of a step; returns all rows, those of earlier steps among them."""
    below = folder / f"step-{step:06d}"
    below.mkdir(parents=True, exist_ok=True)
    rows = [row for row in read_pictures(folder) if row.step != step]
    rows = [row for row in rows if resumed_step is None or row.step <= resumed_step]
    for one in shown:
        file = below / f"{one.name}.webp"
        with atomic_write(file) as target:
            target.write(one.webp)
        rows.append(
            Kept(step, f"{below.name}/{file.name}", one.modality, one.structure, one.case, one.object, one.frames,
                 one.dsc, score)
        )  # fmt: skip
    return rows


def prune(folder: Path, rows: Sequence[Kept]) -> None:
    """Leave the first, the best and the last step; the table first, so that it never names a file that is gone."""
    steps = sorted({row.step for row in rows})
    scores = {row.step: row.score for row in rows}
    best = max(steps, key=lambda step: (scores[step] == scores[step], scores[step], -step))
    kept = {steps[0], best, steps[-1]}
    with atomic_write(folder / TABLE, "w") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Kept)])
        writer.writeheader()
        writer.writerows(vars(row) for row in sorted(rows, key=lambda row: row.step) if row.step in kept)
    names = {f"step-{step:06d}" for step in kept}
    for below in folder.glob("step-*"):
        if below.is_dir() and below.name not in names:
            shutil.rmtree(below)


def read_pictures(folder: Path) -> list[Kept]:
    """The rows of pictures.csv; empty where there is none."""
    path = folder / TABLE
    if not path.is_file():
        return []
    kinds = {"step": int, "object": int, "frames": int, "dsc": float, "score": float}
    with open(path, newline="") as file:
        return [Kept(**{k: kinds.get(k, str)(v) for k, v in row.items()}) for row in csv.DictReader(file)]
