"""The cases of one rank: read, corrupt, predict, score, and keep each finished case in `parts/`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from medsam2.errors import UserError
from medsam2.evaluation.corruptions.registry import corrupt
from medsam2.evaluation.loaded_case import LoadedCase
from medsam2.evaluation.report.overlays import Drawn, PictureChoice, make_picture, save, scores_of
from medsam2.evaluation.run.checkpoints import Contestant
from medsam2.evaluation.run.resume import Failure, Part, PartsFolder
from medsam2.evaluation.run.score_case import Predicted, predict_case
from medsam2.evaluation.run.sources import CaseList, CaseName
from medsam2.evaluation.settings import EvaluateSettings, ProtocolSettings

MAX_FAILURES_BEFORE_FIRST_SUCCESS = 5
"""After so many failures the run ends: the fault is not in the cases."""
READ, PREDICT = "read", "predict"


@dataclass(frozen=True, eq=False)
class Run:
    """What every rank needs: the settings, the cases with their names, and the folder of parts."""

    settings: EvaluateSettings
    cases: CaseList
    names: Sequence[CaseName]
    parts: PartsFolder

    def unfinished(self) -> list[int]:
        """The cases that have no rows yet, the largest first."""
        self.parts.load()
        found = [self.parts.find(name.key, name.state) for name in self.names]
        numbers = [number for number, part in enumerate(found) if part is None or part.failure is not None]
        return sorted(numbers, key=lambda number: -self.names[number].size)


def run_cases(run: Run, contestants: Sequence[Contestant], numbers: Iterable[int], rank: int) -> None:
    """Predict and score the cases `numbers`, and keep each as soon as it is finished.

    Raises:
        UserError: the first cases all failed.
    """
    choice = PictureChoice(run.settings.overlays, run.settings.worst)
    failures, any_success = 0, False
    for number in numbers:
        part = run_case(run, contestants, number, choice)
        run.parts.append(rank, part)
        failures += part.failure is not None
        any_success |= part.failure is None
        if part.failure is not None and failures >= MAX_FAILURES_BEFORE_FIRST_SUCCESS and not any_success:
            raise UserError(
                f"the first {failures} cases all failed, so the others are not tried: {part.failure.reason} "
                f"{part.failure.remedy}"
            )


def run_case(run: Run, contestants: Sequence[Contestant], number: int, choice: PictureChoice) -> Part:
    """Predict and score one case. Any fault becomes the failure of this case, so that it does not end the run."""
    name = run.names[number]
    part = Part(name.key, name.dataset, name.case, run.parts.fingerprint(name.state))
    stage = READ
    try:
        case = run.cases.load(number)
        if not case.objects:
            raise UserError("nothing is labelled in it; leave it out or label it.")
        stage = PREDICT
        rows, pictures = _predict(run, contestants, name, case, choice)
    except Exception as error:  # also a fault of ours: the scores of the other cases are still worth having
        print(f"left out: case {name.case} of {name.dataset}: {error}", file=sys.stderr)  # names are for the user alone
        return replace(part, failure=_failure(run, number, stage, error))
    return replace(part, rows=tuple(rows), pictures=tuple(pictures))


def _predict(
    run: Run, contestants: Sequence[Contestant], name: CaseName, case: LoadedCase, choice: PictureChoice
) -> tuple[list[dict[str, Any]], list[Drawn]]:
    rows: list[dict[str, Any]] = []
    pictures: list[Drawn] = []
    for corruption, severity, shown in _versions(run.settings, case):
        for protocol in run.settings.all_protocols:
            found = [_one(contestant, shown, protocol, run.settings) for contestant in contestants]
            for same_object in zip(*found, strict=True):  # side by side, so that one object is held at a time
                rows += [asdict(replace(p.row, corruption=corruption, severity=severity)) for p in same_object]
                if not corruption and choice.offered(same_object[0].row, same_object[-1].row.dsc):
                    pictures.append(_draw(run, name, shown, same_object, len(pictures)))
    return rows, pictures


def _versions(settings: EvaluateSettings, case: LoadedCase) -> Iterator[tuple[str, int, LoadedCase]]:
    """The case as it is, then each damaged version of it."""
    yield "", 0, case
    for corruption in settings.corruption.applicable(case.modality, case.kind):
        for severity in settings.corruption.severities:
            yield corruption, severity, corrupt(case, corruption, severity, settings.seed)


def _one(
    contestant: Contestant, case: LoadedCase, protocol: ProtocolSettings, settings: EvaluateSettings
) -> Iterator[Predicted]:
    leak = bool(case.content_hash) and case.content_hash in contestant.trained_on
    note = contestant.note
    return predict_case(
        contestant.predictor, case, protocol, settings.metrics, note.label, leak, protocol.name in note.outside
    )


def _draw(run: Run, name: CaseName, case: LoadedCase, seen: tuple[Predicted, ...], number: int) -> Drawn:
    path = run.parts.picture(name.key, number)
    save(make_picture(case, seen), path)
    return Drawn(Path(path.name), asdict(seen[0].row), scores_of(seen))


def _failure(run: Run, number: int, stage: str, error: Exception) -> Failure:
    """What went wrong, without the names of files (they may be a patient's), and what to do."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        reason = f"out of memory ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        remedy = "Give batch_frames=1, fewer ranks a machine or device=cpu, and resume=true."
    elif isinstance(error, UserError):
        reason, remedy = str(error), "Mend what the reason names, and resume=true tries it again."
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
        reason = f"{type(error).__name__} at {where}: {error}"
        remedy = "Report it if the case is sound; resume=true tries it again."
    return Failure(stage, run.cases.without_names(number, reason), remedy)
