"""`python train.py mode=check ...`: all of a run but the run, before hours are spent on it. Nothing is written.

Whatever is wrong is collected and said together at the end, as one `UserError` (status 2).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from rich import box
from rich.console import Console
from rich.table import Table

from medsam2.errors import UserError
from medsam2.model.adaptation import apply_adaptation
from medsam2.training.auto_batch import number_of_ranks, with_largest_batch
from medsam2.training.cases import TrainingData
from medsam2.training.check_data import DataRow, check_data, data_table
from medsam2.training.check_step import StepFigures, measure_steps
from medsam2.training.checkpoints import resume_path
from medsam2.training.launch import explain_launch
from medsam2.training.machine import GIB
from medsam2.training.memory import advice, is_out_of_memory
from medsam2.training.module import FineTuner
from medsam2.training.optim import parameter_groups, training_table
from medsam2.training.settings import TrainSettings
from medsam2.training.starts import global_batch_of, peek, starting_model

P = ParamSpec("P")
R = TypeVar("R")
Line = tuple[str, str]
MIB = 2**20


class Problems:
    """What is wrong, collected: one part that fails does not keep the next from being looked at."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def attempt(self, part: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """The part's result; None where it met something that the user can mend."""
        try:
            return part(*args, **kwargs)
        except UserError as error:
            self.found.append(str(error))
            return None


@rank_zero_only
def check(settings: TrainSettings, name: str = "") -> None:
    """Look at one run and print what it would be; on several ranks the first does it, on one device.

    Args:
        name: of the phase, where the run is one of a curriculum.

    Raises:
        UserError: everything that is wrong.
    """
    from medsam2.training.fit import find_module, quiet_lightning, refuse_taken, report

    quiet_lightning()
    L.seed_everything(settings.seed, workers=True, verbose=False)
    problems, console = Problems(), wide_console()
    problems.attempt(refuse_taken, settings)
    module_class = problems.attempt(find_module, settings.module)
    resume = problems.attempt(resume_path, settings)
    if settings.trainer.auto_batch and module_class is not None:
        before = global_batch_of(resume) if resume else None
        settings = problems.attempt(with_largest_batch, settings, module_class, before) or settings
    data = problems.attempt(_open_data, settings) if module_class is None or module_class.needs_data else None
    rows = problems.attempt(check_data, data.plan) if data is not None else None
    if rows:
        console.print(data_table(rows))
        problems.found += [f"{row.source}: {problem}" for row in rows for problem in row.problems]
    loaded = problems.attempt(starting_model, settings)
    if loaded is not None:
        problems.attempt(apply_adaptation, loaded.sam, settings.adaptation)
        report(training_table(loaded.sam, parameter_groups(loaded.sam, settings.optim)), data)
    ranks = problems.attempt(explain_launch(number_of_ranks), settings)
    figures = None
    if module_class is not None and loaded is not None and rows and ranks:
        module = module_class(loaded, settings, tuple(data.content_hashes()), data.provenance()) if data else None
        if resume is not None and module is not None:
            problems.attempt(_refuse_other_run, resume, module, data, ranks)
        figures = problems.attempt(_measure, settings, module_class)
    cases = problems.attempt(lambda: len(data.validation_cases)) if data is not None else None
    lines = [*_steps(settings, rows or [], figures, ranks or 1), *_validation(settings, cases)]
    console.print(_summary([*lines, *_output(settings, figures)], name))
    problems.found += [*_limits(settings, figures), *_room(settings, figures)]
    finish(problems.found, name)


def finish(found: list[str], name: str) -> None:
    """The verdict: a line, or everything that is wrong."""
    where = f"phase {name}: " if name else ""
    if not found:
        print(f"check: {where}nothing is wrong; nothing was written.", flush=True)
        return
    listed = "\n".join(f"  - {problem}" for problem in dict.fromkeys(found))
    raise UserError(f"check: {where}{len(dict.fromkeys(found))} thing(s) to mend before the run:\n{listed}")


def wide_console() -> Console:
    """Tables keep their columns where the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=int(os.environ.get("COLUMNS", 160)))


# ------------------------------------------------------------------------------------------------- the parts


def _open_data(settings: TrainSettings) -> TrainingData:
    data = TrainingData(settings, settings.model.image_size)
    assert data.plan.sources  # the plan is made when it is asked for: what is wrong with it shows here
    if settings.keep.distillation and settings.keep.distil_on == "old":
        assert data.old_datasets
    return data


@dataclass
class _Ranks:
    """What a datamodule asks of a trainer, of a run that was not started."""

    world_size: int
    global_rank: int = 0


def _refuse_other_run(path: Path, module: FineTuner, data: TrainingData | None, ranks: int) -> None:
    """As `fit.refuse_other_run`, for the ranks that the run would have."""
    checkpoint = peek(path)
    module.on_load_checkpoint(checkpoint)
    if data is not None:
        data.trainer = _Ranks(ranks)  # type: ignore[assignment]
        data.load_state_dict(checkpoint.get(type(data).__qualname__, {}))
        data.trainer = None


def _measure(settings: TrainSettings, module_class: type[FineTuner]) -> StepFigures:
    try:
        return measure_steps(settings, module_class)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        listed = "; ".join(advice(settings))
        raise UserError(
            f"a step of this recipe does not fit in memory ({str(error).splitlines()[0]}): {listed}"
        ) from None


# ------------------------------------------------------------------------------------------------- the summary


def _summary(lines: list[Line], name: str) -> Table:
    table = Table(title=f"The run{f' of phase {name}' if name else ''}", title_justify="left", box=box.SIMPLE_HEAD)
    table.show_header = False
    table.add_column("")
    table.add_column("", overflow="fold")
    for line in lines:
        table.add_row(*line)
    return table


def _steps(settings: TrainSettings, rows: list[DataRow], figures: StepFigures | None, ranks: int) -> list[Line]:
    own, data = settings.trainer, settings.data
    clips = data.clips_per_batch * ranks * own.accumulate
    lines = [("global batch", f"{clips} clips: {data.clips_per_batch} x {own.accumulate} x {ranks} rank(s)")]
    if figures is None:
        return [*lines, ("step", "not measured")]
    each, wait = mean_step(figures, data.stills.share), reading(rows, settings)
    step = max(each, wait)
    losses = ", ".join(f"{loss:.3g}" for loss in figures.losses)
    kinds = ", ".join(f"{kind} {seconds:.3g} s" for kind, seconds in figures.seconds.items())
    alone = " (on one device; the exchange between ranks is not in it)" if ranks > 1 else ""
    waits = f"; the device waits for data {1 - each / step:.0%} of the time: raise data.workers" if wait > each else ""
    return [
        *lines,
        ("step", f"{kinds} on {figures.device}, {own.precision}{alone}; losses {losses}"),
        ("reading", f"{wait:.3g} s a batch with data.workers={data.workers}{waits}"),
        (
            "memory",
            f"{figures.used / GIB:.2f} GiB at the peak of the largest batch, of {figures.free / GIB:.1f} GiB free",
        ),
        ("an epoch", f"{clock(data.steps_per_epoch * own.accumulate * step)} ({data.steps_per_epoch} steps)"),
        ("the run", f"{clock(own.max_steps * own.accumulate * step)} ({own.max_steps} steps), without validation"),
    ]


def mean_step(figures: StepFigures, stills: float) -> float:
    """Seconds of a loader step of the device alone, clips and stills in their shares."""
    shares = {"clips": 1 - stills, "stills": stills}
    return sum(seconds * shares[kind] for kind, seconds in figures.seconds.items())


def reading(rows: list[DataRow], settings: TrainSettings) -> float:
    """Seconds in which the workers of one rank (or its own process, which then does nothing else) read a batch."""
    data = settings.data
    sizes = {"clips": data.clips_per_batch, "stills": data.stills.clips_per_batch}
    shares = {"clips": 1 - data.stills.share, "stills": data.stills.share}
    total = 0.0
    for kind, size in sizes.items():
        known = [row for row in rows if row.kind == kind and not math.isnan(row.read_ms)]
        weight = sum(row.share for row in known)
        if weight:
            total += shares[kind] * size * sum(row.share * row.read_ms for row in known) / weight / 1000
    return total / max(data.workers, 1)


def _validation(settings: TrainSettings, cases: int | None) -> list[Line]:
    own = settings.validation
    if cases is None or not own.cases:
        return []
    split, best = settings.data.val_split, "its best checkpoint is by their mean DSC"
    return [
        ("validation", f"{cases} whole case(s) of split {split!r} every {settings.trainer.val_every} steps; {best}")
    ]


def _output(settings: TrainSettings, figures: StepFigures | None) -> list[Line]:
    size = f" of {figures.checkpoint / MIB:.1f} MiB" if figures else ""
    files = f"config.yaml, environment.json, metrics.csv, report.html, checkpoints/ ({kept(settings)} files{size})"
    return [("would write", f"{settings.output}: {files}; {free_disk(settings.output) / GIB:.1f} GiB free there")]


def kept(settings: TrainSettings) -> int:
    """Checkpoints that a run keeps: last, the one before, and the best where anything says which is."""
    return 3 if settings.validation.cases or settings.validation.clips else 2


# ----------------------------------------------------------------------------------------------- what is wrong


def _limits(settings: TrainSettings, figures: StepFigures | None) -> list[str]:
    if figures is None:
        return []
    found = []
    if not figures.finite:
        found.append(
            f"a loss is not finite (losses {figures.losses}): lower optim.lr, or try trainer.precision=32-true or "
            "debug=anomaly"
        )
    if figures.used > figures.free:
        found.append(
            f"the largest batch takes {figures.used / GIB:.1f} GiB of {figures.free / GIB:.1f} GiB: "
            + "; ".join(advice(settings))
        )
    return found


def _room(settings: TrainSettings, figures: StepFigures | None) -> list[str]:
    """Room for the checkpoints, one of them twice while it is written, and the right to write."""
    place = existing(settings.output)
    if not os.access(place, os.W_OK | os.X_OK):
        return [f"output={settings.output}: {place} cannot be written to; choose another folder, or mend its rights"]
    need = (kept(settings) + 1) * figures.checkpoint if figures else 0
    free = free_disk(settings.output)
    if need <= free:
        return []
    return [
        f"output={settings.output}: {kept(settings)} checkpoints and the one being written take {need / GIB:.2f} GiB, "
        f"{free / GIB:.2f} are free; choose another disk or make room"
    ]


def existing(path: str | Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    found = Path(path).expanduser().absolute()
    return next(folder for folder in (found, *found.parents) if folder.is_dir())


def free_disk(path: str | Path) -> int:
    return shutil.disk_usage(existing(path)).free


def clock(seconds: float) -> str:
    """'2 h 05 min' for 7,500 seconds.

    >>> clock(7500), clock(90), clock(3.2)
    ('2 h 05 min', '2 min', '3.2 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes / 1440:.1f} days"
