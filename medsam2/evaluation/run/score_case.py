"""Predict and score cases: the core of `evaluate.py`, and what training validates with.

Legend: N objects, T frames, H and W pixels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from medsam2.evaluation.loaded_case import LoadedCase
from medsam2.evaluation.metrics.metrics import Scores, score
from medsam2.evaluation.protocol.protocols import Scene, scored_frames
from medsam2.evaluation.run.interactive import clicks_to, run, trail_text
from medsam2.evaluation.run.sources import load_cases
from medsam2.evaluation.settings import MetricSettings, ProtocolSettings
from medsam2.inference.predictor import FramePrompt, Predictor
from medsam2.model.tracker import Tracker

__all__ = ["LoadedCase", "Predicted", "Row", "load_cases", "predict_case", "score_cases"]

OBJECTS_AT_ONCE = 16
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""Written to `RESET`, it makes Linux count the peak of resident memory anew."""


@dataclass(frozen=True, kw_only=True)
class Row(Scores):
    """One object of one case: one row of cases.parquet and cases.csv, with the fields of `metrics.Scores`.

    Attributes:
        checkpoint: its label. protocol, dataset, modality, kind, structure: names. case, patient: salted hashes.
        object: number within the case. frames: T; scored_frames: how many of them the protocol scores.
        prompt_frames: the prompted ones, corrected ones among them, separated by spaces.
        corruption, severity: what was done to the images, if anything.
        clicks: points given in all, positive and negative. iou_by_clicks: "clicks:IoU" after each prediction that
            corrections looked at, separated by spaces; noc85, noc90: the number of clicks to an IoU of 0.85 and 0.9
            (`interactive.clicks_to`). Empty and NaN without corrections.
        outside: whether the protocol uses a kind of prompt that the checkpoint was not trained with.
        seconds: wall time of predicting the objects of the case that were predicted together, all rounds of correction
            included. peak_mb: most memory held meanwhile (`Cost`).
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
    scored_frames: int
    prompt_frames: str
    corruption: str = ""
    severity: int = 0
    clicks: int = 0
    iou_by_clicks: str = ""
    noc85: float = math.nan
    noc90: float = math.nan
    outside: bool = False
    seconds: float
    peak_mb: float
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
    metrics: MetricSettings | None = None,
    batch_frames: int = 8,
) -> list[Row]:
    """Rows of all objects of all cases; without `metrics` only overlaps are scored (the rest NaN), which is faster."""
    predictor = Predictor(tracker, batch_frames)
    return [found.row for case in cases for found in predict_case(predictor, case, protocol, metrics)]


def predict_case(
    predictor: Predictor,
    case: LoadedCase,
    protocol: ProtocolSettings,
    metrics: MetricSettings | None = None,
    checkpoint: str = "",
    leak: bool = False,
    outside: bool = False,
) -> Iterator[Predicted]:
    """Predict all objects of a case (in batches of 16) and score each.

    Of a batch one bit a pixel and object is held, of the object that is yielded a byte. See `Row` for the arguments.
    """
    scene = Scene(case)
    for first in range(0, len(case.objects), OBJECTS_AT_ONCE):
        targets = scene.targets[first : first + OBJECTS_AT_ONCE]
        with measure_cost(predictor.tracker.device) as cost:
            attempts = run(predictor, case.frames, targets, protocol)
        for attempt in attempts:
            prediction, truth, number = attempt.mask.dense(), attempt.target.dense(), attempt.target.number
            kept = scored_frames(protocol, attempt.target.areas, attempt.prompted)
            part = slice(None) if len(kept) == len(truth) else kept  # a copy only where frames are left out
            structure, volume = case.objects[number].name, case.kind == "volume"
            scores = score(
                prediction[part],
                truth[part],
                case.spacing if volume else (1.0, 1.0, 1.0),
                volume,
                prompted=tuple(np.flatnonzero(np.isin(kept, attempt.prompted)).tolist()),
                settings=metrics,
                structure=structure,
            )
            row = Row(
                checkpoint=checkpoint,
                protocol=protocol.name,
                dataset=case.dataset,
                modality=case.modality,
                kind=case.kind,
                case=case.case,
                patient=case.patient or case.case,
                structure=structure,
                object=number,
                frames=len(prediction),
                scored_frames=len(kept),
                prompt_frames=" ".join(map(str, attempt.prompted)),
                clicks=attempt.clicks,
                iou_by_clicks=trail_text(attempt.trail),
                noc85=clicks_to(attempt.trail, 0.85, protocol.corrections.most),
                noc90=clicks_to(attempt.trail, 0.90, protocol.corrections.most),
                outside=outside,
                seconds=cost.seconds,
                peak_mb=cost.peak_mb,
                leak=leak,
                **vars(scores),
            )
            yield Predicted(row, truth, prediction, attempt.prompts)


@dataclass
class Cost:
    """What happened inside `measure_cost`, once it has ended.

    Attributes:
        seconds: wall time.
        peak_mb: most memory held meanwhile, in MB (1e6 bytes): what torch allocated on a CUDA device; elsewhere the
            resident memory of the whole process, model and case included; NaN where the system does not tell.
    """

    seconds: float = math.nan
    peak_mb: float = math.nan


@contextmanager
def measure_cost(device: torch.device) -> Iterator[Cost]:
    """Measure the time and memory of what happens inside."""
    cost, on_gpu = Cost(), device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # not Linux, or a sandbox that forbids it: the peak is then that of the whole run
        RESET.write_text(RESET_PEAK)
    start = time.perf_counter()
    yield cost
    if on_gpu:
        torch.cuda.synchronize(device)
        cost.peak_mb = torch.cuda.max_memory_allocated(device) / 1e6
    elif STATUS.exists():
        peaks = [line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        cost.peak_mb = int(peaks[0]) * 1024 / 1e6 if peaks else math.nan
    cost.seconds = time.perf_counter() - start
