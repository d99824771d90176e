"""Overlays of a few fixed validation clips at each validation: `pictures/` in the run folder, and the loggers.

One clip of each modality and structure: the frames around the slice where its first object is largest, prompted there
by a box and tracked both ways. Always the same frames, prompt and crop, so that steps compare; it costs a few frames,
not whole cases. On disk the first, the best and the last validation are kept.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from medsam2.evaluation.metrics import dice
from medsam2.evaluation.overlays import object_frames
from medsam2.evaluation.predictor import FramePrompt, Predictor
from medsam2.files import atomic_write
from medsam2.model.tracker import Tracker
from medsam2.prompts.strategies import tight_box
from medsam2.reporting.overlays import Strip, choose_frames, crop_around, draw_sheet, encode
from medsam2.reporting.style import PREDICTIONS
from medsam2.training.retention import ValidationCase
from medsam2.training.validation import gather_rows

FOLDER, TABLE = "pictures", "pictures.csv"
CLIP = ["modality", "structure", "case", "object"]  # what tells clips apart
COLUMNS = ["step", "file", *CLIP, "frames", "dsc", "score"]
"""Of pictures.csv. file: below the folder of pictures. score: mean DSC of that validation. Others: as of `Shown`."""
CLIP_FRAMES = 9


@dataclass(frozen=True, order=True)
class Candidate:
    """An object that may get a picture; candidates are chosen in this order. case: a salted hash."""

    general: bool
    modality: str
    structure: str
    dataset: str
    case: str
    object: int


@dataclass(frozen=True)
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
        return re.sub(r"[^\w-]", "-", f"{self.modality}_{self.structure}_{self.case[:8]}_{self.object}")

    @property
    def caption(self) -> str:
        """What is shown, for the loggers."""
        length = "a still" if self.frames == 1 else f"{self.frames} frames"
        return f"{self.modality} {self.structure}, case {self.case[:8]}: DSC {self.dsc:.3f} ({length})"


def candidates(cases: Iterable[ValidationCase]) -> list[Candidate]:
    """All objects of this rank's cases."""
    return [
        Candidate(not entry.own, entry.case.modality, label.name, entry.case.dataset, entry.case.case, number)
        for entry in cases
        for number, label in enumerate(entry.case.objects)
    ]


def choose(everything: Iterable[Candidate], limit: int) -> list[Candidate]:
    """The first of each modality and structure, modalities in turn, at most `limit`; the same for any ranks."""
    first: dict[tuple[str, str], Candidate] = {}
    for candidate in sorted(everything):
        first.setdefault((candidate.modality, candidate.structure), candidate)
    turns = Counter[str]()
    ranked = []
    for candidate in first.values():
        turns[candidate.modality] += 1
        ranked.append((turns[candidate.modality], candidate))
    return [candidate for _, candidate in sorted(ranked)[:limit]]


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
    score = float(dice(predicted, truth))
    what = candidate.modality, candidate.structure, candidate.case, candidate.object
    return Shown(*what, score, len(truth), encode(sheet))


class Pictures(Callback):
    """Draws after each validation.

    It stands before the moving average of the weights, so that the pictures are of the weights that were validated.

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
        entries = {(e.case.dataset, e.case.case): e for e in getattr(data, "validation_cases", ())}
        if self.chosen is None:
            self.chosen = choose(gather_rows(candidates(entries.values())), self.limit)
        mine = [
            (candidate, picture(pl_module.tracker, entries[candidate.dataset, candidate.case], candidate))
            for candidate in self.chosen
            if (candidate.dataset, candidate.case) in entries
        ]
        everywhere = dict(gather_rows(mine))
        self.shown = [everywhere[candidate] for candidate in self.chosen if candidate in everywhere]

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """When the means are known: keep the files, and hand the pictures to the loggers."""
        if not self.shown:
            return
        step = trainer.global_step
        score = float(trainer.callback_metrics.get("val/dsc", float("nan")))
        save_pictures(self.folder, self.shown, step, score, self.resumed_step)
        self.resumed_step = None
        for logger in trainer.loggers:
            if hasattr(logger, "log_pictures"):
                logger.log_pictures(self.shown, step)


def save_pictures(
    folder: Path, shown: Sequence[Shown], step: int, score: float, resumed_step: int | None = None
) -> None:
    """Write the pictures of a step, and leave those of the first, the best and the last step.

    The table is written before files are removed, so that it never names a file that is gone.
    """
    below = folder / f"step-{step:06d}"
    below.mkdir(parents=True, exist_ok=True)
    earlier = read_rows(folder / TABLE, COLUMNS)
    earlier = earlier[(earlier["step"] != step) & (earlier["step"] <= (step if resumed_step is None else resumed_step))]
    rows = earlier.to_dict("records")
    for one in shown:
        with atomic_write(below / f"{one.name}.webp") as target:
            target.write(one.webp)
        what = {name: getattr(one, name) for name in (*CLIP, "frames", "dsc")}
        rows.append({"step": step, "file": f"{below.name}/{one.name}.webp", **what, "score": score})
    table = pd.DataFrame(rows).sort_values("step", kind="stable")
    kept = {table["step"].min(), best_step(table), table["step"].max()}
    with atomic_write(folder / TABLE, "w") as file:
        table[table["step"].isin(kept)].to_csv(file, index=False)
    names = {f"step-{step:06d}" for step in kept}
    for path in folder.glob("step-*"):
        if path.name not in names:
            shutil.rmtree(path)


def best_step(table: pd.DataFrame) -> int:
    """The step with the highest known score, of equal ones the first. table: the rows of pictures.csv."""
    scores = table.groupby("step")["score"].first()
    return int(scores.idxmax() if scores.notna().any() else scores.index[0])


def read_rows(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The rows of a csv of a run folder; where it is missing, none under these columns.

    Names stay text, also where all of them are numbers or one is "nan"; scores may be unknown.
    """
    if not path.is_file():
        return pd.DataFrame(columns=list(columns))
    names = dict.fromkeys(set(columns) - {"step", "object", "objects", "cases", "frames", "dsc", "score"}, str)
    unknown = dict.fromkeys(("dsc", "score"), ["", "nan"])
    return pd.read_csv(path, dtype=names, keep_default_na=False, na_values=unknown)
