"""What a run measures, writes and prints about itself: throughput, its tables and events, lines or a bar, its page."""

from __future__ import annotations

import csv
import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from medsam2.data.datamodule import ClipDataModule
from medsam2.errors import first_line
from medsam2.files import write_text
from medsam2.shards.target import mask_secrets
from medsam2.training.callbacks.validation import INTERPOLATION, by_structure
from medsam2.training.loggers.csv_log import FILE as METRICS
from medsam2.training.loggers.csv_log import read_rows, write_rows
from medsam2.training.run_folder.checkpoints import owes_validation, validated_at
from medsam2.training.run_folder.resume import STATED, announce, peek, recipe_changes
from medsam2.training.settings import TrainSettings

VALIDATION = "validation.csv"
REPORT_INTERVAL_SECONDS = 60.0  # at least, between two pages of a run that goes on
EVENTS = "events.csv"
EVENT_COLUMNS = ("time", "kind", "text")
BEGIN, END, WARNING, NOTE = "begin", "end", "warning", "note"
FINISHED = "finished"  # the text of the end of a run that has all its steps
PACKAGES = ("medsam2", "torch", "torchvision", "rf-sam-2", "lightning", "monai", "peft", "numpy")


class Throughput(Callback):
    """Logs clips a second of each rank, the share of time spent waiting for data, memory, and segments that were lost.

    The loggers save as it goes. Batches may differ in size (stills and clips), so that each is asked for its own.
    Validation between two steps is not counted, nor is the saving of a checkpoint as waiting.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.batch_end = self.window_start = time.monotonic()
        self.waited, self.clips, self.validated = 0.0, 0, False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.batch_end = self.window_start = time.monotonic()

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        gap = time.monotonic() - max(self.batch_end, getattr(module, "batch_ended", 0.0))
        if self.validated:
            self.window_start += gap
        else:
            self.waited += gap
        self.validated = False

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        now = time.monotonic()
        self.batch_end = now
        self.clips += len(getattr(batch, "keys", ()))
        if trainer.global_step % self.every == 0:
            elapsed = max(now - self.window_start, 1e-9)
            found = {
                "train/clips_per_second": self.clips / elapsed,
                "train/data_wait": self.waited / elapsed,
                "train/memory_gb": peak_memory(trainer.strategy.root_device) / 1e9,
            }
            lost = self._lost(trainer)
            module.log_dict({**found, "data/lost": lost} if lost else found, batch_size=1)
            self.window_start, self.waited, self.clips = now, 0.0, 0
            for logger in trainer.loggers:
                logger.save()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.validated = True

    @staticmethod
    def _lost(trainer: L.Trainer) -> float:
        """Damaged segments that other clips replaced so far, over all ranks."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ClipDataModule):
            return 0.0
        lost = torch.tensor(float(data.lost.total), device=trainer.strategy.root_device)
        return float(trainer.strategy.reduce(lost, reduce_op="sum"))


def peak_memory(device: torch.device) -> float:
    """Most bytes held so far: on a GPU by tensors of this process, else by the process itself (workers apart)."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


class ValidationTable(Callback):
    """`validation.csv`: the DSC of each modality and structure at each validation.

    Rows of later steps, which a run that was interrupted has left, are dropped.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / VALIDATION

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if module.scores and not trainer.sanity_checking:
            means = by_structure(module.scores, trainer.global_step)
            earlier = [row for row in read_rows(self.path) if int(row["step"]) < trainer.global_step]
            write_rows(self.path, means[0], [*earlier, *means])


class RunReport(Callback):
    """Writes the page as the run goes, and at its end. A page that cannot be written never ends a run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.written = folder, time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if time.monotonic() - self.written > REPORT_INTERVAL_SECONDS and not trainer.sanity_checking:
            self.write(trainer)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self.write(trainer)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.write(trainer)

    @rank_zero_only
    def write(self, trainer: L.Trainer) -> None:
        from medsam2.training.report import write_report  # pandas and matplotlib take a second

        try:
            for logger in trainer.loggers:
                logger.save()
            if (self.folder / METRICS).is_file():
                write_report(self.folder)
        except Exception as error:  # a full disk, for example: the run reports it where it loses something
            note(self.folder, WARNING, f"report.html could not be written: {error}")
        self.written = time.monotonic()


class LossByKind(Callback):
    """Logs `train/loss_KIND`: the mean loss of the batches that had this kind of prompt since the last logged step.

    Lightning would log the last value of a kind again and again until it is drawn anew.
    """

    def __init__(self, every: int) -> None:
        self.every, self.logged = every, 0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        step = trainer.global_step
        if module.kind_losses and step % self.every == 0 and step > self.logged:
            means = {f"train/loss_{kind}": float(torch.stack(of).mean()) for kind, of in module.kind_losses.items()}
            self.logged, module.kind_losses = step, {}
            for logger in trainer.loggers:
                logger.log_metrics(means, step - 1)  # Lightning logs a step with the number that it begins at


# ---------------------------------------------------------------------------------------------- its events


@dataclass(frozen=True)
class Event:
    """time: UTC. kind: "begin", "end", "warning" or "note"."""

    time: datetime
    kind: str
    text: str


@rank_zero_only
def note(folder: Path, kind: str, text: str, at: datetime | None = None) -> None:
    """Append an event; a disk that is full is told of elsewhere."""
    with suppress(OSError), open(folder / EVENTS, "a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(EVENT_COLUMNS)
        stamp = (at or datetime.now(UTC)).isoformat(timespec="seconds")
        writer.writerow([stamp, kind, " ".join(text.split())])


def read_events(folder: Path) -> list[Event]:
    """In the order in which they happened; a line that was cut off is left out."""
    events = []
    for row in read_rows(folder / EVENTS):
        with suppress(ValueError):
            at = datetime.fromisoformat(row["time"])
            if row["text"] is not None:
                events.append(Event(at, row["kind"], row["text"]))
    return events


def course(events: Iterable[Event]) -> list[Event]:
    """When the run began and ended, what else was said left out."""
    return [event for event in events if event.kind in (BEGIN, END)]


def is_running(events: Iterable[Event]) -> bool:
    """Whether the run has begun, and not ended since."""
    return [event.kind for event in course(events)[-1:]] == [BEGIN]


def seconds_of(events: Iterable[Event], now: datetime | None = None) -> float:
    """The time in which the run ran, interruptions left out; one that runs counts up to `now`."""
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
            note(self.folder, END, "killed", last_sign(self.folder))
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
    """Whether nothing of a run is left to do, its last validation included; says so, or what is repeated.

    `last.ckpt` is saved before the last validation, so that the events tell whether that came to its end.

    Args:
        checkpoint: the one to go on from. validated: the run has validations.
    """
    content, folder = peek(checkpoint), Path(settings.output)
    step, last = int(content["global_step"]), settings.trainer.max_steps
    if step < last:
        return False
    ended = [event.text for event in course(read_events(folder))[-1:]]
    interpolated = not settings.keep.interpolate or (folder / INTERPOLATION).is_file()
    complete = ended == [FINISHED] and interpolated
    if validated and not complete and owes_validation(step, validated_at(content), settings.trainer.val_every):
        announce(f"{checkpoint} is of the last step, {step}; its validation was cut off and is repeated")
        return False
    announce(
        f"{checkpoint} is of step {step} of {last}: this run is finished. To make it longer give a larger "
        "trainer.max_steps; to begin a new run from its weights, start=."
    )
    return True


def last_sign(folder: Path) -> datetime:
    """When a run that was killed last wrote something."""
    files = (folder / METRICS, folder / "checkpoints" / "last.ckpt")
    latest = max((path.stat().st_mtime for path in files if path.exists()), default=time.time())
    return datetime.fromtimestamp(latest, UTC)


# ---------------------------------------------------------------------------------------- its description


class Lines(Callback):
    """A line now and then where no terminal can show a bar (batch jobs, logs)."""

    def __init__(self, max_steps: int, seconds: float = 15.0) -> None:
        self.max_steps, self.seconds = max_steps, seconds
        self.start = self.last = time.monotonic()
        self.first_step = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.start, self.first_step = time.monotonic(), trainer.global_step

    @rank_zero_only
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        now, step = time.monotonic(), trainer.global_step
        if now - self.last < self.seconds and step < self.max_steps:
            return
        self.last = now
        pace = (now - self.start) / max(step - self.first_step, 1)
        loss = float(trainer.callback_metrics.get("loss", math.nan))
        left = pace * (self.max_steps - step)
        print(f"step {step}/{self.max_steps}  loss {loss:.3f}  {pace:.2f} s/step  {left:.0f} s left", flush=True)

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        found = {name: trainer.callback_metrics.get(name) for name in ("val/dsc", "val/loss")}
        text = "  ".join(f"{name} {float(value):.4f}" for name, value in found.items() if value is not None)
        if text and not trainer.sanity_checking:
            print(f"step {trainer.global_step}  {text}", flush=True)


def progress_callbacks(settings: TrainSettings) -> list[Callback]:
    """A bar on a terminal, lines elsewhere."""
    kind = settings.trainer.progress
    if kind == "auto":
        kind = "bar" if sys.stdout.isatty() else "lines"
    if kind == "none":
        return []
    return [RichProgressBar() if kind == "bar" else Lines(settings.trainer.max_steps)]


class Description(Callback):
    """Writes config.yaml and environment.json when training begins: a resume that is refused changes neither."""

    def __init__(self, settings: TrainSettings, folder: Path) -> None:
        self.settings, self.folder = settings, folder

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        config = yaml.safe_dump(self.settings.model_dump(mode="json"), sort_keys=False)
        write_text(self.folder / "config.yaml", mask_secrets(config))
        write_environment(self.folder, trainer)
        for logger in trainer.loggers:
            logger.log_hyperparams(self.settings.model_dump(mode="json"))


def write_environment(folder: Path, trainer: L.Trainer) -> None:
    """environment.json: versions, git revision and devices of this run (no host name, no user name)."""
    installed = {one.name.lower().replace("_", "-"): one.version for one in distributions()}
    root = Path(__file__).resolve().parents[3]
    revision = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    environment = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": {name: installed.get(name, "not installed") for name in PACKAGES},
        "git": revision.stdout.strip() or None,
        "device": device_name(trainer.strategy.root_device),
        "ranks": trainer.world_size,
        "nodes": trainer.num_nodes,
    }
    write_text(folder / "environment.json", json.dumps(environment, indent=2))


def device_name(device: torch.device) -> str:
    """The GPU's name, or the number of threads of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type.upper()
