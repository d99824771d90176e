"""Overlays of a few fixed validation clips at each validation: `pictures/` in the run folder, and the loggers.

One clip of each modality and structure: the frames around the slice where its first object is largest, prompted there
by a box and tracked both ways. Always the same frames, prompt and crop, so that steps compare; it costs a few frames,
not whole cases. On disk the first, the best and the last validation are kept.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, zip_longest
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from medsam2.evaluation.metrics.metrics import dice
from medsam2.evaluation.report.overlays import object_frames
from medsam2.files import atomic_write
from medsam2.inference.predictor import FramePrompt, Predictor
from medsam2.model.tracker import Tracker
from medsam2.prompts.evaluation import tight_box
from medsam2.reporting.overlays import Strip, choose_frames, crop_around, draw_sheet, encode
from medsam2.reporting.style import PREDICTIONS
from medsam2.training.callbacks.validation import ValidationCase, gather_rows
from medsam2.training.loggers.csv_log import read_rows, write_rows

FOLDER, TABLE = "pictures", "pictures.csv"
CLIP = ["modality", "structure", "case", "object"]  # what tells clips apart
COLUMNS = ["step", "file", *CLIP, "frames", "dsc", "score"]
"""Of pictures.csv. file: below the folder of pictures. score: mean DSC of that validation."""
CLIP_FRAMES = 9


@dataclass(frozen=True, order=True)
class Candidate:
    """An object that may get a picture. The order of candidates does not depend on the salt of `case`."""

    general: bool
    modality: str
    structure: str
    dataset: str
    content_hash: str
    case: str
    object: int


@dataclass(frozen=True)
class Shown:
    """A picture of one object. dsc: over the frames of its clip. webp: the file's content."""

    of: Candidate
    dsc: float
    frames: int
    webp: bytes

    @property
    def name(self) -> str:
        """A file name that says what is shown."""
        of = self.of
        return re.sub(r"[^\w-]", "-", f"{of.modality}_{of.structure}_{of.case[:8]}_{of.object}")

    @property
    def caption(self) -> str:
        """What is shown, for the loggers."""
        length = "a still" if self.frames == 1 else f"{self.frames} frames"
        return f"{self.of.modality} {self.of.structure}, case {self.of.case[:8]}: DSC {self.dsc:.3f} ({length})"


def candidates(cases: Iterable[ValidationCase]) -> list[Candidate]:
    """All objects of this rank's cases."""
    return [
        Candidate(
            general=entry.general,
            modality=entry.case.modality,
            structure=label.name,
            dataset=entry.case.dataset,
            content_hash=entry.case.content_hash,
            case=entry.case.case,
            object=number,
        )
        for entry in cases
        for number, label in enumerate(entry.case.objects)
    ]


def choose(everything: Iterable[Candidate], limit: int) -> list[Candidate]:
    """The first of each modality and structure, modalities in turn, at most `limit`; the same for any ranks."""
    first: dict[tuple[str, str], Candidate] = {}
    for candidate in sorted(everything):
        first.setdefault((candidate.modality, candidate.structure), candidate)
    modalities = [tuple(group) for _, group in groupby(first.values(), key=lambda one: (one.general, one.modality))]
    return [candidate for candidate in chain(*zip_longest(*modalities)) if candidate is not None][:limit]


def picture(tracker: Tracker, entry: ValidationCase, candidate: Candidate) -> Shown:
    """Predict the clip of an object, and draw it: up to five frames with outlines, the box, and the DSC of each."""
    case = entry.case
    whole = case.mask(candidate.object)
    largest = int(whole.sum((1, 2)).argmax())
    start = max(min(largest - CLIP_FRAMES // 2, len(whole) - CLIP_FRAMES), 0)
    truth, frames = whole[start : start + CLIP_FRAMES], case.frames[start : start + CLIP_FRAMES]
    prompt = FramePrompt(largest - start, 0, box=tight_box(truth[largest - start]))
    predicted = Predictor(tracker).predict(frames, [prompt], "both").masks[0].numpy()
    crop = crop_around(np.asarray(truth.any(0)))  # of the truth alone, so that steps compare
    shown = choose_frames(truth, (prompt.frame,))
    panels = object_frames(frames.numpy(), truth, predicted, [prompt], shown, crop, PREDICTIONS[0])
    sheet = draw_sheet([Strip(panels)], aspect=case.spacing[1] / case.spacing[2])
    return Shown(candidate, float(dice(predicted, truth)), len(truth), encode(sheet))


class Pictures(Callback):
    """Draws after each validation.

    It stands before the moving average of the weights, so that the pictures are of the weights that were validated.

    Args:
        folder: the run folder. limit: at most so many clips.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder / FOLDER, limit
        self.clips: list[Candidate] | None = None
        self.shown: list[Shown] = []

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Draw the clips of this rank's cases, and gather the pictures of all ranks."""
        data = getattr(trainer, "datamodule", None)
        entries = {(e.case.dataset, e.case.case): e for e in getattr(data, "validation_cases", ())}
        if self.clips is None:
            self.clips = choose(gather_rows(candidates(entries.values())), self.limit)
        mine = [
            picture(pl_module.tracker, entries[candidate.dataset, candidate.case], candidate)
            for candidate in self.clips
            if (candidate.dataset, candidate.case) in entries
        ]
        everywhere = {shown.of: shown for shown in gather_rows(mine)}
        self.shown = [everywhere[candidate] for candidate in self.clips if candidate in everywhere]

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """When the means are known: keep the files, and hand the pictures to the loggers."""
        if not self.shown:
            return
        step = trainer.global_step
        score = float(trainer.callback_metrics.get("val/dsc", float("nan")))
        save_pictures(self.folder, self.shown, step, score)
        for logger in trainer.loggers:
            if hasattr(logger, "log_pictures"):
                logger.log_pictures(self.shown, step)


def save_pictures(folder: Path, shown: Sequence[Shown], step: int, score: float) -> None:
    """Write the pictures of a step, and remove all but those of the first, the best and the last step.

    Pictures of later steps, which an interrupted run has left, are removed too. The table is written before files are
    removed, so that it never names a missing file.
    """
    below = folder / f"step-{step:06d}"
    below.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [row for row in read_rows(folder / TABLE) if int(row["step"]) < step]
    for one in shown:
        file = f"{below.name}/{one.name}.webp"
        with atomic_write(folder / file) as target:
            target.write(one.webp)
        rows.append({**vars(one.of), **vars(one), "step": step, "file": file, "score": score})
    scores = {int(row["step"]): float(row["score"]) for row in rows}
    best = max(scores, key=lambda number: -math.inf if math.isnan(scores[number]) else scores[number])
    steps = {min(scores), best, step}
    rows = [{name: row[name] for name in COLUMNS} for row in rows if int(row["step"]) in steps]
    write_rows(folder / TABLE, COLUMNS, rows)
    for path in folder.glob("step-*"):
        if path.name not in {f"step-{number:06d}" for number in steps}:
            shutil.rmtree(path)
