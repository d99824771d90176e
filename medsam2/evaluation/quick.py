"""Predict and score cases: the core of `evaluate.py`, and what training validates with.

Legend: N objects, T frames, H and W pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from medsam2.evaluation.metrics import Scores, score
from medsam2.evaluation.predictor import FramePrompt, Predictor
from medsam2.evaluation.protocols import apply
from medsam2.evaluation.settings import ProtocolSettings
from medsam2.evaluation.sources import CaseObject, LoadedCase, load_cases
from medsam2.model.tracker import Tracker

__all__ = ["CaseObject", "LoadedCase", "Predicted", "Row", "Tolerance", "load_cases", "predict_case", "score_cases"]

OBJECTS_AT_ONCE = 16


@dataclass(frozen=True)
class Tolerance:
    """Tolerance of the surface Dice: mm for volumes, pixels for clips and stills."""

    mm: float = 2.0
    px: float = 2.0


@dataclass(frozen=True)
class Row:
    """The scores of one object of one case: one row of cases.parquet and cases.csv.

    Attributes:
        checkpoint: its label. protocol, dataset, modality, kind, structure: names. case, patient: salted hashes.
        object: number within the case. frames: T. prompt_frames: the prompted ones, separated by spaces.
        voxels: size of the ground truth.
        dsc ... absent_all_empty: see `metrics.Scores`; nsd is NaN where it was not asked for.
        seconds: wall time of predicting all objects of the case together.
        leak: whether the checkpoint was trained on this very image.
    """

    checkpoint: str
    protocol: str
    dataset: str
    modality: str
    kind: str
    case: str
    patient: str
    structure: str
    object: int
    frames: int
    prompt_frames: str
    voxels: int
    dsc: float
    iou: float
    nsd: float
    prompt_dsc: float
    other_dsc: float
    absent_empty_share: float
    absent_all_empty: bool | None
    seconds: float
    leak: bool = False


@dataclass(frozen=True, eq=False)
class Predicted:
    """One object of one case: its row, and what pictures need. truth, prediction: bool [T, H, W]."""

    row: Row
    truth: np.ndarray
    prediction: np.ndarray
    prompts: tuple[FramePrompt, ...]


def score_cases(
    tracker: Tracker,
    cases: Iterable[LoadedCase],
    protocol: ProtocolSettings,
    tolerance: Tolerance | None = None,
    batch_frames: int = 8,
) -> list[Row]:
    """Rows of all objects of all cases; without a `tolerance` the surface Dice is left out (NaN), which is faster."""
    predictor = Predictor(tracker, batch_frames)
    return [found.row for case in cases for found in predict_case(predictor, case, protocol, tolerance)]


def predict_case(
    predictor: Predictor,
    case: LoadedCase,
    protocol: ProtocolSettings,
    tolerance: Tolerance | None = None,
    checkpoint: str = "",
    leak: bool = False,
) -> Iterator[Predicted]:
    """Predict all objects of a case (in batches of 16) and score each."""
    for first in range(0, len(case.objects), OBJECTS_AT_ONCE):
        numbers = range(first, min(first + OBJECTS_AT_ONCE, len(case.objects)))
        prompts = [prompt for i in numbers for prompt in apply(protocol, case.mask(i), i - first)]
        start = time.perf_counter()
        masks = predictor.predict(case.frames, prompts, protocol.direction).masks.numpy()
        seconds = time.perf_counter() - start
        for i in numbers:
            own = tuple(prompt for prompt in prompts if prompt.object == i - first)
            frames = tuple(sorted({prompt.frame for prompt in own}))
            truth, prediction = case.mask(i), masks[i - first]
            scores = _score(case, truth, prediction, tolerance, frames)
            row = Row(
                checkpoint=checkpoint,
                protocol=protocol.name,
                dataset=case.dataset,
                modality=case.modality,
                kind=case.kind,
                case=case.case,
                patient=case.patient or case.case,
                structure=case.objects[i].name,
                object=i,
                frames=len(truth),
                prompt_frames=" ".join(map(str, frames)),
                voxels=int(truth.sum()),
                seconds=seconds,
                leak=leak,
                **vars(scores),
            )
            yield Predicted(row, truth, prediction, own)


def _score(
    case: LoadedCase, truth: np.ndarray, prediction: np.ndarray, tolerance: Tolerance | None, prompted: tuple[int, ...]
) -> Scores:
    volume = case.kind == "volume"
    spacing = case.spacing if volume else (1.0, 1.0, 1.0)
    allowed = math.nan if tolerance is None else tolerance.mm if volume else tolerance.px
    return score(prediction, truth, spacing, allowed, volume, prompted)
