"""What a run measures, writes and prints about itself: throughput, its tables, lines or a bar, its page."""

from __future__ import annotations

import json
import math
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.utilities import rank_zero_only

from medsam2.data.datamodule import ClipDataModule
from medsam2.files import write_text
from medsam2.shards.target import mask_secrets
from medsam2.training.callbacks.validation import VALIDATION, by_structure
from medsam2.training.loggers.csv_log import FILE as METRICS
from medsam2.training.loggers.csv_log import read_rows, write_rows
from medsam2.training.run_folder.events import WARNING, note
from medsam2.training.settings import TrainSettings

REPORT_INTERVAL_SECONDS = 60.0  # at least, between two pages of a run that goes on
PACKAGES = ("medsam2", "torch", "torchvision", "rf-sam-2", "lightning", "monai", "peft", "numpy")


class Throughput(Callback):
    """Logs clips per second of each rank, the share of time spent waiting for data, memory, and lost segments.

    It also makes the loggers save. Clips are counted per batch, since batches of stills and of clips differ in size.
    Time of validation is left out, and time that saves a checkpoint does not count as waiting.
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
            metrics = {
                "train/clips_per_second": self.clips / elapsed,
                "train/data_wait": self.waited / elapsed,
                "train/memory_gb": peak_memory(trainer.strategy.root_device) / 1e9,
            }
            lost = self._lost(trainer)
            module.log_dict({**metrics, "data/lost": lost} if lost else metrics, batch_size=1)
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
        lost = torch.tensor(float(data.damage_budget.total), device=trainer.strategy.root_device)
        return float(trainer.strategy.reduce(lost, reduce_op="sum"))


def peak_memory(device: torch.device) -> float:
    """Peak memory in bytes: of this process's tensors on a GPU, else of the process itself without its workers."""
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


# --------------------------------------------------------------------------------- progress and description


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
        metrics = {name: trainer.callback_metrics.get(name) for name in ("val/dsc", "val/loss")}
        text = "  ".join(f"{name} {float(value):.4f}" for name, value in metrics.items() if value is not None)
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
