"""Predicts and scores cases, for `evaluate.py` and for validation during training.

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
from medsam2.evaluation.run.interactive import format_history, number_of_clicks, predict_objects
from medsam2.evaluation.settings import MetricSettings, ProtocolSettings
from medsam2.inference.predictor import FramePrompt, Predictor
from medsam2.model.tracker import Tracker

MAX_OBJECTS_PER_BATCH = 16
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""Written to `RESET`, it makes Linux reset the peak of resident memory."""


@dataclass(frozen=True, kw_only=True)
class Row(Scores):
    """One object of one case: one row of cases.parquet and cases.csv, with the fields of `metrics.Scores`.

    Attributes:
        checkpoint: its label. protocol, dataset, modality, kind, structure: names. case, patient: salted hashes.
        object: number within the case. frames: T; scored_frames: the number of frames that the protocol scores.
        prompt_frames: the prompted and corrected frames, separated by spaces.
        corruption, severity: of the images; "" and 0 for clean images.
        clicks: total number of points, positive and negative. iou_by_clicks: "clicks:IoU" after each prediction that
            was compared for corrections, separated by spaces; noc85, noc90: the number of clicks to an IoU of 0.85 and
            0.9 (`interactive.number_of_clicks`). Empty and NaN without corrections.
        outside: whether the protocol uses a kind of prompt that the checkpoint was not trained with.
        seconds: wall time of predicting the batch of objects that this one belongs to, with all correction rounds.
            peak_mb: peak memory meanwhile (`Cost`).
        leak: whether the checkpoint was trained on this image.
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
class ObjectPrediction:
    """One object of one case: its row, and its masks and prompts for pictures. truth, prediction: bool [T, H, W]."""

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
    """Score all objects of all cases; without `metrics` only overlaps (other scores are NaN), which is faster."""
    predictor = Predictor(tracker, batch_frames)
    return [prediction.row for case in cases for prediction in predict_case(predictor, case, protocol, metrics)]


def predict_case(
    predictor: Predictor,
    case: LoadedCase,
    protocol: ProtocolSettings,
    metrics: MetricSettings | None = None,
    checkpoint: str = "",
    leak: bool = False,
    outside: bool = False,
) -> Iterator[ObjectPrediction]:
    """Predict all objects of a case (in batches of 16) and score each. See `Row` for the arguments.

    Keeps packed bits for the batch; unpacks one object at a time.
    """
    scene = Scene(case)
    for first in range(0, len(case.objects), MAX_OBJECTS_PER_BATCH):
        targets = scene.targets[first : first + MAX_OBJECTS_PER_BATCH]
        with measure_cost(predictor.tracker.device) as cost:
            attempts = predict_objects(predictor, case.frames, targets, protocol)
        for attempt in attempts:
            prediction, truth, number = attempt.mask.dense(), attempt.target.dense(), attempt.target.number
            frames = scored_frames(protocol, attempt.target.areas, attempt.prompted)
            selection = slice(None) if len(frames) == len(truth) else frames  # a slice does not copy the masks
            structure, volume = case.objects[number].name, case.kind == "volume"
            scores = score(
                prediction[selection],
                truth[selection],
                case.spacing if volume else (1.0, 1.0, 1.0),
                volume,
                prompted=tuple(np.flatnonzero(np.isin(frames, attempt.prompted)).tolist()),
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
                scored_frames=len(frames),
                prompt_frames=" ".join(map(str, attempt.prompted)),
                clicks=attempt.clicks,
                iou_by_clicks=format_history(attempt.iou_history),
                noc85=number_of_clicks(attempt.iou_history, 0.85, protocol.corrections.most),
                noc90=number_of_clicks(attempt.iou_history, 0.90, protocol.corrections.most),
                outside=outside,
                seconds=cost.seconds,
                peak_mb=cost.peak_mb,
                leak=leak,
                **vars(scores),
            )
            yield ObjectPrediction(row, truth, prediction, attempt.prompts)


@dataclass
class Cost:
    """Time and memory of the block inside `measure_cost`, set when the block ends.

    Attributes:
        seconds: wall time.
        peak_mb: peak memory in MB (1e6 bytes): of torch's allocator on a CUDA device; elsewhere the resident memory of
            the whole process, including model and case; NaN if the system does not report it.
    """

    seconds: float = math.nan
    peak_mb: float = math.nan


@contextmanager
def measure_cost(device: torch.device) -> Iterator[Cost]:
    """Measure the time and memory of the block inside."""
    cost, on_gpu = Cost(), device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # fails outside Linux and in some sandboxes; the peak is then that of the whole run
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
