"""events.csv of a run folder: when the run began, ended and what it warned of, over all its interruptions."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from medsam2.errors import first_line
from medsam2.training.callbacks.validation import INTERPOLATION
from medsam2.training.loggers.csv_log import FILE as METRICS
from medsam2.training.loggers.csv_log import read_rows
from medsam2.training.run_folder.checkpoints import validated_at, validation_pending
from medsam2.training.run_folder.resume import STATED, announce, peek, recipe_changes
from medsam2.training.settings import TrainSettings

EVENTS = "events.csv"
EVENT_COLUMNS = ("time", "kind", "text")
BEGIN, END, WARNING, NOTE = "begin", "end", "warning", "note"
FINISHED = "finished"  # the text of the end of a run that has all its steps


@dataclass(frozen=True)
class Event:
    """time: UTC. kind: "begin", "end", "warning" or "note"."""

    time: datetime
    kind: str
    text: str


@rank_zero_only
def note(folder: Path, kind: str, text: str, at: datetime | None = None) -> None:
    """Append an event. A full disk is ignored here: saving the next checkpoint reports it."""
    with suppress(OSError), open(folder / EVENTS, "a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(EVENT_COLUMNS)
        stamp = (at or datetime.now(UTC)).isoformat(timespec="seconds")
        writer.writerow([stamp, kind, " ".join(text.split())])


def read_events(folder: Path) -> list[Event]:
    """Return the events in their order; a truncated line is left out."""
    events = []
    for row in read_rows(folder / EVENTS):
        with suppress(ValueError):
            at = datetime.fromisoformat(row["time"])
            if row["text"] is not None:
                events.append(Event(at, row["kind"], row["text"]))
    return events


def course(events: Iterable[Event]) -> list[Event]:
    """Return the events that begin or end the run."""
    return [event for event in events if event.kind in (BEGIN, END)]


def is_running(events: Iterable[Event]) -> bool:
    """Whether the run has begun, and not ended since."""
    return [event.kind for event in course(events)[-1:]] == [BEGIN]


def run_seconds(events: Iterable[Event], now: datetime | None = None) -> float:
    """Return the running time in seconds without interruptions; a run that still runs counts up to `now`."""
    ends = [*course(events), Event(now or datetime.now(UTC), END, "")]
    return sum((end.time - begin.time).total_seconds() for begin, end in pairwise(ends) if begin.kind == BEGIN)


class Events(Callback):
    """Notes the run's begin and end.

    Args:
        settings: the run's. folder: the run folder. resume: the checkpoint that it goes on from, if any.
    """

    def __init__(self, settings: TrainSettings, folder: Path, resume: Path | None) -> None:
        self.settings, self.folder, self.resume = settings, folder, resume
        self.changes: list[tuple[str, Any, Any]] = []

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.changes = recipe_changes(checkpoint, self.settings, STATED)

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if is_running(read_events(self.folder)):
            note(self.folder, END, "killed", last_write_time(self.folder))
        if self.resume is None:
            note(self.folder, BEGIN, f"a new run from {Path(self.settings.start).name}")
            return
        note(self.folder, BEGIN, f"goes on from step {trainer.global_step} ({self.resume.name})")
        if self.settings.resume == "auto" and self.resume.stem != "last":
            note(self.folder, WARNING, f"last.ckpt was damaged or missing; the run went on from {self.resume.name}")
        for field, before, now in self.changes:
            note(self.folder, WARNING, f"{field} was {before} and is {now} from step {trainer.global_step} on")

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step, last = trainer.global_step, trainer.max_steps
        note(self.folder, END, FINISHED if step >= last else f"stopped at step {step} of {last}")

    @rank_zero_only
    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if not is_running(read_events(self.folder)):
            return  # training had not begun
        step, first = trainer.global_step, first_line(exception)
        if isinstance(exception, SIGTERMException | KeyboardInterrupt):
            note(self.folder, END, f"stopped at step {step} of {trainer.max_steps}: {first}")
        else:
            note(self.folder, END, f"ended at step {step} by {type(exception).__name__}: {first}")


def is_finished(checkpoint: Path, settings: TrainSettings, validated: bool) -> bool:
    """Whether a run is complete, its last validation included; prints that, or what is repeated.

    `last.ckpt` is saved before the last validation, so that the events tell whether that came to its end.

    Args:
        checkpoint: the one to go on from. validated: the run has validations.
    """
    content, folder = peek(checkpoint), Path(settings.output)
    step, last = int(content["global_step"]), settings.trainer.max_steps
    if step < last:
        return False
    ended = [event.text for event in course(read_events(folder))[-1:]]
    interpolated = not settings.retention.interpolate or (folder / INTERPOLATION).is_file()
    complete = ended == [FINISHED] and interpolated
    if validated and not complete and validation_pending(step, validated_at(content), settings.trainer.val_every):
        announce(f"{checkpoint} is of the last step, {step}; its validation was cut off and is repeated")
        return False
    announce(
        f"{checkpoint} is of step {step} of {last}: this run is finished. To make it longer give a larger "
        "trainer.max_steps; to begin a new run from its weights, start=."
    )
    return True


def last_write_time(folder: Path) -> datetime:
    """Return the time at which a killed run last wrote a file."""
    files = (folder / METRICS, folder / "checkpoints" / "last.ckpt")
    latest = max((path.stat().st_mtime for path in files if path.exists()), default=time.time())
    return datetime.fromtimestamp(latest, UTC)
