"""`evaluate.py`: every case, every checkpoint, one protocol; then the table, the files and the pictures.

The output folder holds cases.parquet and cases.csv (one row an object and checkpoint, `quick.Row`), summary.json
(`summary`), report.html and overlays/*.png.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medsam2.errors import UserError, did_you_mean
from medsam2.evaluation.overlays import OverlayPlan, Picture, make_picture
from medsam2.evaluation.predictor import Predictor
from medsam2.evaluation.quick import Predicted, Row, Tolerance, predict_case
from medsam2.evaluation.settings import EvaluateSettings
from medsam2.evaluation.sources import CaseList, LoadedCase, find_source
from medsam2.evaluation.summary import LEVEL, summarise
from medsam2.files import atomic_write, new_folder
from medsam2.model.build import load_model
from medsam2.model.tracker import Tracker

if TYPE_CHECKING:
    import pandas as pd
    from rich.progress import Progress


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """What an evaluation found. rows: one an object and checkpoint. summary: as summary.json. folder: where it is."""

    rows: pd.DataFrame
    summary: dict[str, Any]
    folder: Path


@dataclass(frozen=True, eq=False)
class _Contestant:
    """One checkpoint: its label, its predictor, and the hashes of the images that it was trained on."""

    label: str
    predictor: Predictor
    trained_on: frozenset[str]


def evaluate(settings: EvaluateSettings) -> EvaluationResult:
    """Score `settings.checkpoint` on `settings.data.source`, print one table and write the output folder.

    Raises:
        UserError: a path, split, structure or device that does not exist, or an output folder that does.
    """
    from medsam2.evaluation import report

    output = Path(settings.output)
    _refuse_existing(output)
    data = settings.data
    cases = find_source(data.source, settings.split, settings.limit, settings.structures, data.layout, data.modality)
    contestants = _load(settings)
    plan = OverlayPlan(settings.overlays)
    rows, failed = _run(settings, cases, contestants, plan)
    frame = _table(rows)
    labels = [contestant.label for contestant in contestants]
    summary = {
        "protocol": settings.protocol.model_dump(),
        "source": cases.source,
        "grid": cases.grid,
        "split": settings.split if cases.grid == "stored" else None,
        "checkpoints": labels,
        "bootstrap": {"seed": settings.seed, "resamples": settings.resamples, "level": LEVEL},
        "tolerance": {"mm": settings.nsd_mm, "px": settings.nsd_px},
        "leaks": _leaks(frame, labels),
        "failed": failed,
        "groups": summarise(frame, labels, settings.seed, settings.resamples),
    }
    new_folder(output)
    _write(output, frame, summary, settings)
    pictures = plan.draw(output / "overlays")
    report.write_page(output / "report.html", summary, frame, pictures, settings)
    report.print_table(summary, frame)
    return EvaluationResult(frame, summary, output)


def _refuse_existing(output: Path) -> None:
    """Before hours of work, not after."""
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"output={output} already exists; choose another folder or remove it first.")


# ------------------------------------------------------------------------------------------------------- loading


def _load(settings: EvaluateSettings) -> list[_Contestant]:
    device, precision = _device(settings.device), torch.bfloat16 if settings.precision == "bf16" else None
    names = settings.checkpoints
    if settings.labels and len(settings.labels) != len(names):
        raise UserError(f"labels has {len(settings.labels)} names, but there are {len(names)} checkpoints.")
    if len(set(settings.labels)) < len(settings.labels):
        raise UserError(f"labels={list(settings.labels)}: two checkpoints have the same name.")
    contestants = []
    for label, name in zip(settings.labels or short_names(names), names, strict=True):
        loaded = load_model(name)
        tracker = Tracker(loaded.sam).eval().to(device)
        predictor = Predictor(tracker, settings.batch_frames, autocast=precision)
        contestants.append(_Contestant(label, predictor, frozenset(loaded.metadata.get("content_hashes", ()))))
    return contestants


def short_names(checkpoints: tuple[str, ...]) -> tuple[str, ...]:
    """Labels for tables: the run's folder where a checkpoint lies in one, else the file's stem; numbered if equal."""
    names = []
    for checkpoint in checkpoints:
        path = Path(checkpoint)
        in_run = path.parent.name == "checkpoints" and path.parent.parent.name
        names.append(path.parent.parent.name if in_run else path.stem if path.suffix else path.name)
    return tuple(
        name if names.count(name) == 1 else f"{name}-{names[: place + 1].count(name)}"
        for place, name in enumerate(names)
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = did_you_mean(name, ["auto", "cpu", "cuda"])
        raise UserError(f"device={name}: give auto, cpu, cuda or cuda:N.{hint}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}: this machine has no CUDA device; give device=cpu.")
    return device


# ------------------------------------------------------------------------------------------------------- running


def _run(
    settings: EvaluateSettings, cases: CaseList, contestants: list[_Contestant], plan: OverlayPlan
) -> tuple[list[Row], int]:
    """Rows of all cases, and how many cases could not be read; these are named on stderr and left out."""
    tolerance = Tolerance(settings.nsd_mm, settings.nsd_px)
    rows: list[Row] = []
    failed = 0
    with _progress() as progress:
        task = progress.add_task("cases", total=cases.count)
        for number in range(cases.count):
            try:
                case = cases.load(number)
            except UserError as error:
                failed += 1
                progress.console.print(f"left out: {error}", markup=False, highlight=False)
                continue
            found = [_predict(contestant, case, settings, tolerance) for contestant in contestants]
            rows += [predicted.row for one in found for predicted in one]
            for same_object in zip(*found, strict=True):
                plan.offer(partial(_picture, case, same_object), same_object[0].row)
            progress.advance(task)
    if not rows:
        raise UserError(f"{cases.source}: nothing to score; of {cases.count} cases {failed} could not be read.")
    return rows, failed


def _predict(
    contestant: _Contestant, case: LoadedCase, settings: EvaluateSettings, tolerance: Tolerance
) -> list[Predicted]:
    leak = bool(case.content_hash) and case.content_hash in contestant.trained_on
    return list(predict_case(contestant.predictor, case, settings.protocol, tolerance, contestant.label, leak))


def _picture(case: LoadedCase, seen: tuple[Predicted, ...]) -> Picture:
    first = seen[0]
    return make_picture(
        frames=case.frames.numpy(),
        spacing=case.spacing,
        truth=first.truth,
        predictions={p.row.checkpoint: p.prediction for p in seen},
        scores={p.row.checkpoint: p.row.dsc for p in seen},
        prompts=first.prompts,
        row=first.row,
    )


@contextmanager
def _progress() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        if not console.is_terminal:
            print("evaluating ...", file=sys.stderr)
        yield progress


# ------------------------------------------------------------------------------------------------------- writing


def _table(rows: list[Row]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame([asdict(row) for row in rows]).astype({"absent_all_empty": "boolean"})


def _leaks(frame: pd.DataFrame, labels: list[str]) -> dict[str, int]:
    leaking = frame[frame["leak"]][["checkpoint", "dataset", "case"]].drop_duplicates()
    return {label: int((leaking["checkpoint"] == label).sum()) for label in labels}


def _write(output: Path, frame: pd.DataFrame, summary: dict[str, Any], settings: EvaluateSettings) -> None:
    with atomic_write(output / "cases.parquet") as file:
        frame.to_parquet(file, index=False)
    with atomic_write(output / "cases.csv", "w") as file:
        frame.to_csv(file, index=False)
    with atomic_write(output / "summary.json", "w") as file:
        json.dump(summary, file, indent=1, allow_nan=False)
        file.write("\n")
    with atomic_write(output / "settings.json", "w") as file:
        file.write(settings.model_dump_json(indent=1) + "\n")
