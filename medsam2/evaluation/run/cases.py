"""Runs the cases of one rank: reads, corrupts, predicts and scores each case and stores its result in `parts/`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from medsam2.errors import UserError
from medsam2.evaluation.corruptions.registry import corrupt
from medsam2.evaluation.loaded_case import LoadedCase
from medsam2.evaluation.report.overlays import DrawnPicture, PictureSelection, draw_picture
from medsam2.evaluation.run.checkpoints import LoadedCheckpoint
from medsam2.evaluation.run.resume import CaseResult, CaseResults, Failure
from medsam2.evaluation.run.score_case import ObjectPrediction, predict_case
from medsam2.evaluation.run.sources import CaseList, CaseName
from medsam2.evaluation.settings import EvaluateSettings, ProtocolSettings

MAX_FAILURES_BEFORE_FIRST_SUCCESS = 5
"""The run ends after this many failures, since the cause is then probably not in the cases."""


@dataclass(frozen=True, eq=False)
class Run:
    """An evaluation: its settings, its cases with their names, its checkpoints, and the results so far."""

    settings: EvaluateSettings
    cases: CaseList
    names: Sequence[CaseName]
    checkpoints: Sequence[LoadedCheckpoint]
    results: CaseResults

    def unfinished(self) -> list[int]:
        """Numbers of the cases that have no rows yet, the largest first."""
        self.results.load()
        results = [self.results.find(name.key, name.state) for name in self.names]
        numbers = [number for number, result in enumerate(results) if result is None or result.failure is not None]
        return sorted(numbers, key=lambda number: -self.names[number].size)


def run_cases(run: Run, numbers: Iterable[int], rank: int) -> None:
    """Predict and score the cases `numbers`, and store each result as soon as it is finished.

    Raises:
        UserError: the first cases all failed.
    """
    selection = PictureSelection(run.settings.overlays, run.settings.worst)
    failures, any_success = 0, False
    for number in numbers:
        result = run_case(run, number, selection)
        run.results.append(rank, result)
        if result.failure is None:
            any_success = True
            continue
        failures += 1
        if failures >= MAX_FAILURES_BEFORE_FIRST_SUCCESS and not any_success:
            raise UserError(
                f"the first {failures} cases all failed, so the evaluation stops: {result.failure.reason} "
                f"{result.failure.remedy}"
            )


def run_case(run: Run, number: int, selection: PictureSelection) -> CaseResult:
    """Predict and score one case. Any exception becomes the failure of this case and does not end the run."""
    name = run.names[number]
    result = CaseResult(name.key, name.dataset, name.case, run.results.fingerprint(name.state))
    stage = "read"
    try:
        case = run.cases.load(number)
        if not case.objects:
            raise UserError("it has no labels; label it or remove it.")
        stage = "predict"
        rows, pictures = _predict(run, name, case, selection)
    except Exception as error:  # bugs too, because the scores of the other cases are still worth having
        # Only the terminal shows the error with file names; `_failure` redacts them
        print(f"failed: case {name.case} of {name.dataset}: {error}", file=sys.stderr)
        return replace(result, failure=_failure(run, number, stage, error))
    return replace(result, rows=tuple(rows), pictures=tuple(pictures))


def _predict(
    run: Run, name: CaseName, case: LoadedCase, selection: PictureSelection
) -> tuple[list[dict[str, Any]], list[DrawnPicture]]:
    rows: list[dict[str, Any]] = []
    pictures: list[DrawnPicture] = []
    for corruption, severity, version in _versions(run.settings, case):
        for protocol in run.settings.all_protocols:
            by_checkpoint = [_predict_objects(one, version, protocol, run.settings) for one in run.checkpoints]
            # Iterating over all checkpoints in parallel keeps the masks of only one object in memory
            for predictions in zip(*by_checkpoint, strict=True):
                rows += [asdict(replace(p.row, corruption=corruption, severity=severity)) for p in predictions]
                if not corruption and selection.may_select(predictions[0].row, predictions[-1].row.dsc):
                    path = run.results.picture_path(name.key, len(pictures))
                    pictures.append(draw_picture(version, predictions, path))
    return rows, pictures


def _versions(settings: EvaluateSettings, case: LoadedCase) -> Iterator[tuple[str, int, LoadedCase]]:
    """Yield (corruption, severity, case): the clean case first, then each corrupted version."""
    yield "", 0, case
    for corruption in settings.corruption.applicable(case.modality, case.kind):
        for severity in settings.corruption.severities:
            yield corruption, severity, corrupt(case, corruption, severity, settings.seed)


def _predict_objects(
    checkpoint: LoadedCheckpoint, case: LoadedCase, protocol: ProtocolSettings, settings: EvaluateSettings
) -> Iterator[ObjectPrediction]:
    leak = bool(case.content_hash) and case.content_hash in checkpoint.trained_on
    info = checkpoint.info
    return predict_case(
        checkpoint.predictor, case, protocol, settings.metrics, info.label, leak, protocol.name in info.outside
    )


def _failure(run: Run, number: int, stage: str, error: Exception) -> Failure:
    """Describe what failed and what to do, without file names because they may contain a patient's name."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        reason = f"out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        remedy = "Set batch_frames=1 or device=cpu, or use fewer ranks per machine, and run again with resume=true."
    elif isinstance(error, UserError):
        reason, remedy = str(error), "Fix the cause, then run again with resume=true."
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
        reason = f"{type(error).__name__} at {where}: {error}"
        remedy = "Report it if the case is valid; resume=true tries it again."
    return Failure(stage, run.cases.redact_names(number, reason), remedy)
