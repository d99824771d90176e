"""`python train.py mode=check ...`: look for problems of a run before hours are spent on it. Nothing is written.

The configuration is validated, a batch of every dataset is read, and a few real steps are taken on one device, from
which memory, time and disk are estimated. Whatever is wrong is collected and reported together at the end.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import psutil
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from medsam2.adaptation.freeze import apply_adaptation
from medsam2.config import validate
from medsam2.data.plan.plan import Plan
from medsam2.data.plan.stream import BLOCK_POSITIONS, Stream
from medsam2.data.read.reader import BatchReader, StepDataset
from medsam2.errors import UserError, first_line
from medsam2.reporting.tables import Table, print_table, words
from medsam2.shards.index import check_shards, read_summary
from medsam2.training.callbacks.log import device_name, peak_memory
from medsam2.training.cases import TrainingData
from medsam2.training.fit import (
    find_module,
    make_module,
    make_trainer,
    prepare_process,
    refuse_existing_run,
    refuse_other_run,
    report,
)
from medsam2.training.launch.limits import advice, free_memory, is_out_of_memory
from medsam2.training.module import FineTuner
from medsam2.training.optim import training_table
from medsam2.training.retention import EmaAverage
from medsam2.training.run_folder.checkpoints import checkpoint_bytes, resume_path
from medsam2.training.run_folder.resume import starting_model
from medsam2.training.settings import TrainSettings

R = TypeVar("R")
NUM_CHECKPOINTS = 3  # last, previous and best
MAX_ERRORS_PER_DATASET = 3
NUM_STEPS = 4  # the first warms up, the last takes all corrections
MIB, GIB = 2**20, 2**30


class Problems(list[str]):
    """Messages of all problems: a part that fails does not prevent the check of the next one."""

    def attempt(self, part: Callable[..., R], *args: Any) -> R | None:
        """Return the part's result, or None after noting an error that the user can correct."""
        try:
            return part(*args)
        except UserError as error:
            self.append(str(error))
            return None


@rank_zero_only
def check(config: dict[str, Any]) -> None:
    """Look at a run and print what it would be; of several ranks the first does it, on one device.

    Args:
        config: the composed configuration, plain values.

    Raises:
        UserError: everything that is wrong.
    """
    settings = validate(TrainSettings, config, "the training configuration")
    prepare_process(settings)
    problems = Problems()
    problems.attempt(refuse_existing_run, settings)
    module_class = problems.attempt(find_module, settings.module) or FineTuner
    resume = problems.attempt(resume_path, settings)
    trainer = problems.attempt(make_trainer, settings, Path(settings.output), None, False)
    data = problems.attempt(open_data, settings) if module_class.needs_data else None
    if data is not None:
        problems += [problem for stream in data.plan.streams.values() for problem in unreadable(data.plan, stream)]
        problems.attempt(lambda: data.validation_cases)
    loaded = problems.attempt(starting_model, settings)
    estimate = None
    if loaded is not None:
        problems.attempt(apply_adaptation, loaded.sam, settings.adaptation)
        report(training_table(loaded.sam, settings.optim), data)
        if trainer is not None and (data is not None or not module_class.needs_data):
            if resume is not None:
                module = make_module(module_class, loaded, settings, data)
                problems.attempt(refuse_other_run, resume, trainer, module, data)
            estimate = problems.attempt(take_steps, settings, module_class)
    ranks = trainer.world_size if trainer is not None else 1
    print_table(summary(settings, estimate, ranks))
    problems += faults(settings, estimate)
    if problems:
        lines = list(dict.fromkeys(problems))
        raise UserError(f"check: {len(lines)} problem(s) to solve before the run:\n  - " + "\n  - ".join(lines))
    print("check: nothing is wrong; nothing was written.", flush=True)


# --------------------------------------------------------------------------------------------------- the data


def open_data(settings: TrainSettings) -> TrainingData:
    """The data of the run, of which everything is computed that a run computes late."""
    data = TrainingData(settings, settings.model.image_size)
    assert data.plan.sources
    if settings.retention.distillation and settings.retention.distil_on == "old":
        assert data.old_datasets
    return data


def unreadable(plan: Plan, stream: Stream) -> Iterator[str]:
    """Read a batch of every dataset of a stream, without augmentation; yields what is wrong with shards and clips."""
    data = plan.settings
    num_clips = data.clips_per_batch if stream.kind == "clips" else data.stills.clips_per_batch
    reader = BatchReader(plan.catalogs, None)
    for source in stream.sources:
        catalog, errors = plan.catalogs[source.folder], []
        if not catalog.store.remote:
            stated = read_summary(catalog.folder).get("shards", {})
            errors = [*check_shards(catalog.folder, catalog.distinct("shard", source.rows), stated)]
        positions = (position for position in range(BLOCK_POSITIONS) if stream.segment(position)[0] is source)
        for position in () if errors else islice(positions, num_clips):
            try:
                reader.read([stream.entry(position)], 0)
            except (UserError, OSError) as error:
                errors.append(f"a clip cannot be read: {error}")
        yield from (f"{source.label}: {error}" for error in errors[:MAX_ERRORS_PER_DATASET])


# ---------------------------------------------------------------------------------------------------- a step


@dataclass
class Estimate(Callback):
    """What steps of a recipe take on one device of this machine. Bytes are those above what the process had before.

    Attributes:
        seconds: of each step: augmentation, forward, backward, update. reading: of each batch, in one process.
        used, free: bytes at the peak, and bytes that were free for it. checkpoint: bytes of one checkpoint.
    """

    settings: TrainSettings
    reading: float = 0.0
    device: str = ""
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    used: float = 0.0
    free: int = 0
    checkpoint: int = 0
    _begun: float = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._begun = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == NUM_STEPS - 1:
            prompts = self.settings.prompts.model_copy(update={"correction_probability": 1.0})
            module.settings = module.settings.model_copy(update={"prompts": prompts})

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]))  # which waits for the device
        now = time.perf_counter()
        self.seconds.append(now - self._begun)
        self._begun = now

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        weights = checkpoint_bytes(module.state_dict()) * (1 if self.settings.ema is None else 2)
        self.checkpoint = weights + sum(checkpoint_bytes(optimizer.state_dict()) for optimizer in trainer.optimizers)

    @property
    def step(self) -> float:
        """Seconds of a usual batch."""
        return statistics.mean(self.seconds[1:-1])


class FirstBatches(TrainingData):
    """The first batches of the run, read before the steps are timed."""

    def train_dataloader(self) -> DataLoader[Any]:
        begun, dataset = time.perf_counter(), StepDataset(self.plan)
        batches = [dataset[step] for step in range(NUM_STEPS)]
        self.reading = (time.perf_counter() - begun) / NUM_STEPS
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a data set


def take_steps(settings: TrainSettings, module_class: type[FineTuner]) -> Estimate:
    """Take a few steps of the run with its own trainer settings, on a copy that is thrown away.

    Raises:
        UserError: a step does not fit in memory.
    """
    trial = settings.model_copy(
        update={
            "validation": settings.validation.model_copy(update={"cases": 0, "clips": 0}),
            "trainer": settings.trainer.model_copy(update={"accumulate": 1}),
        }
    )
    loaded, estimate = starting_model(trial), Estimate(settings)
    apply_adaptation(loaded.sam, trial.adaptation)
    data = FirstBatches(trial, loaded.spec.image_size) if module_class.needs_data else None
    trainer = L.Trainer(
        accelerator=trial.trainer.accelerator, devices=1, precision=trial.trainer.precision,  # type: ignore[arg-type]
        max_steps=NUM_STEPS, logger=False,
        gradient_clip_val=trial.optim.clip, deterministic=trial.deterministic, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
        callbacks=[estimate, *([] if trial.ema is None else [EmaAverage(trial.ema)])],
        plugins=[LightningEnvironment()], use_distributed_sampler=False,
    )  # fmt: skip
    device, before = trainer.strategy.root_device, 0
    if device.type == "cuda":
        estimate.free = torch.cuda.mem_get_info(device)[0]
    else:
        estimate.free, before = free_memory(), psutil.Process().memory_info().rss
    try:
        trainer.fit(make_module(module_class, loaded, trial, data), datamodule=data)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        text = f"a step of this recipe does not fit in memory ({first_line(error)})"
        raise UserError(f"{text}: {'; '.join(advice(settings))}") from None
    estimate.device, estimate.used = device_name(device), max(peak_memory(device) - before, 0.0)
    estimate.reading = data.reading if data is not None else 0.0
    return estimate


# ------------------------------------------------------------------------------------------------- the summary


def summary(settings: TrainSettings, estimate: Estimate | None, ranks: int) -> Table:
    """What the run would be: batch, time, memory and disk."""
    run, data = settings.trainer, settings.data
    clips = data.clips_per_batch * ranks * run.accumulate
    lines = [("global batch", f"{clips} clips: {data.clips_per_batch} x {run.accumulate} x {ranks} rank(s)")]
    if estimate is None:
        lines.append(("step", "not measured"))
    else:
        step, reading = estimate.step, estimate.reading / max(data.workers, 1)
        alone = " (on one device; the exchange between ranks is not in it)" if ranks > 1 else ""
        waits = f"; the device waits {1 - step / reading:.0%} of the time: raise data.workers" if reading > step else ""
        losses = ", ".join(f"{loss:.3g}" for loss in estimate.losses)
        total = run.max_steps * run.accumulate * max(step, reading)
        lines += [
            ("step", f"{step:.3g} s on {estimate.device}, {run.precision}{alone}; losses {losses}"),
            ("all corrections", f"{estimate.seconds[-1]:.3g} s per step"),
            ("reading", f"{reading:.3g} s per batch with data.workers={data.workers}{waits}"),
            ("memory", f"{estimate.used / GIB:.2f} GiB at the peak, {estimate.free / GIB:.1f} GiB are free"),
            ("the run", f"{timedelta(seconds=round(total))} ({run.max_steps} steps), without validation"),
            ("checkpoints", f"{NUM_CHECKPOINTS} files of {estimate.checkpoint / MIB:.1f} MiB"),
        ]
    free = shutil.disk_usage(existing_folder(settings.output)).free
    lines.append(("would write to", f"{settings.output}; {free / GIB:.1f} GiB are free there"))
    return Table("The run", words("", ""), tuple(lines))


def faults(settings: TrainSettings, estimate: Estimate | None) -> list[str]:
    """What the estimates forbid: a loss that is not finite, too little memory, too little room, no right to write."""
    problems, folder = [], existing_folder(settings.output)
    if not os.access(folder, os.W_OK | os.X_OK):
        problems.append(
            f"output={settings.output}: {folder} cannot be written to; choose another folder or change its permissions"
        )
    if estimate is None:
        return problems
    if not all(math.isfinite(loss) for loss in estimate.losses):
        remedy = "lower optim.lr, or try trainer.precision=32-true or debug=anomaly"
        problems.append(f"a loss is not finite (losses {estimate.losses}): {remedy}")
    if estimate.used > estimate.free:
        sizes = f"{estimate.used / GIB:.1f} GiB of {estimate.free / GIB:.1f} GiB"
        problems.append(f"a step takes {sizes}: {'; '.join(advice(settings))}")
    needed, free = (NUM_CHECKPOINTS + 1) * estimate.checkpoint, shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"{needed / GIB:.2f} GiB, {free / GIB:.2f} are free"
        problems.append(
            f"output={settings.output}: the checkpoints and one being written take {sizes}; choose another disk"
        )
    return problems


def existing_folder(path: str) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    absolute = Path(path).expanduser().absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())
