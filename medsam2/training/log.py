"""What a run writes and prints about itself: metrics.csv, lines or a bar, the table of what is trained."""

from __future__ import annotations

import csv
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from medsam2.data.datamodule import ClipDataModule
from medsam2.files import atomic_write
from medsam2.training.settings import TrainSettings

PACKAGES = ("medsam2", "torch", "torchvision", "rf-sam-2", "lightning", "monai", "peft", "numpy")


class CsvLog(Logger):
    """`metrics.csv`: one row a logged step, full precision; it goes on after a resume instead of being deleted.

    Rows of steps after the resumed one (logged by the run that was interrupted) are dropped when it is opened.
    """

    def __init__(self, path: Path, resumed_step: int | None = None) -> None:
        super().__init__()
        self.path = path
        self.changed = False
        self.rows: dict[int, dict[str, float]] = {}
        if resumed_step is not None and path.exists():
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    if int(row["step"]) <= resumed_step:
                        values = {k: float(v) for k, v in row.items() if k != "step" and v not in ("", None)}
                        self.rows[int(row["step"])] = values

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = self.rows.setdefault(int(step or 0), {})
        row.update({k: float(v) for k, v in metrics.items() if k != "epoch"})
        self.changed = True

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is in config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        if not self.changed:  # a run that logged nothing, such as a refused resume, takes nothing away
            return
        columns = sorted({key for row in self.rows.values() for key in row})
        with atomic_write(self.path, "w") as file:
            writer = csv.DictWriter(file, ["step", *columns])
            writer.writeheader()
            for step, row in sorted(self.rows.items()):
                writer.writerow({"step": step, **{k: repr(v) for k, v in row.items()}})
        self.changed = False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


class Throughput(Callback):
    """Logs clips a second of each rank, the share of the time spent waiting for data, and how many segments were lost.

    Saves the csv as it goes. Batches may differ in size (stills and clips), so that each is asked for its own.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.batch_end = self.window_start = time.monotonic()
        self.waited, self.clips = 0.0, 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.batch_end = self.window_start = time.monotonic()

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        self.waited += time.monotonic() - self.batch_end

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        now = time.monotonic()
        self.batch_end = now
        self.clips += len(getattr(batch, "keys", ()))
        if trainer.global_step % self.every == 0:
            elapsed = max(now - self.window_start, 1e-9)
            found = {"train/clips_per_second": self.clips / elapsed, "train/data_wait": self.waited / elapsed}
            lost = self._lost(trainer)
            module.log_dict({**found, "data/lost": lost} if lost else found, batch_size=1)
            self.window_start, self.waited, self.clips = now, 0.0, 0
            for logger in trainer.loggers:
                logger.save()

    @staticmethod
    def _lost(trainer: L.Trainer) -> float:
        """Damaged segments that other clips replaced so far, over all ranks."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ClipDataModule):
            return 0.0
        lost = torch.tensor(float(data.lost.total), device=trainer.strategy.root_device)
        return float(trainer.strategy.reduce(lost, reduce_op="sum"))


class Lines(Callback):
    """A line now and then where no terminal can show a bar (batch jobs, logs)."""

    def __init__(self, max_steps: int, seconds: float = 15.0) -> None:
        self.max_steps, self.seconds = max_steps, seconds
        self.start = self.last = time.monotonic()
        self.first_step = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.start, self.first_step = time.monotonic(), trainer.global_step

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
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
        with atomic_write(self.folder / "config.yaml", "w") as file:
            yaml.safe_dump(self.settings.model_dump(mode="json"), file, sort_keys=False)
        write_environment(self.folder)


def write_environment(folder: Path) -> None:
    """environment.json: versions and git revision of this run (no host name, no user name)."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    root = Path(__file__).resolve().parents[2]
    revision = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    environment = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "git": revision.stdout.strip() or None,
    }
    with atomic_write(folder / "environment.json", "w") as file:
        json.dump(environment, file, indent=2)
