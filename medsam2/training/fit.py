"""One run: settings in, a run folder with checkpoints, curves and configuration out."""

from __future__ import annotations

import importlib
import logging
import warnings
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.table import Table

from medsam2.config import validate
from medsam2.data.datamodule import ClipDataModule
from medsam2.data.plan import ShareRow
from medsam2.errors import UserError
from medsam2.files import new_folder
from medsam2.model.adaptation import apply_adaptation
from medsam2.training.auto_batch import with_largest_batch
from medsam2.training.cases import TrainingData
from medsam2.training.checkpoints import AtomicCheckpointIO, LastCheckpoint, checkpoint_callbacks, resume_path, sweep
from medsam2.training.ends import explained, leave_stopped, made_to_end_well
from medsam2.training.events import Events
from medsam2.training.guard import Guard
from medsam2.training.keep import EmaAverage
from medsam2.training.launch import explain_launch, launch_plugins
from medsam2.training.limits import allow_open_files
from medsam2.training.log import Description, LossByKind, Throughput, ValidationTable, progress_callbacks
from medsam2.training.loggers.registry import make_loggers
from medsam2.training.loop import GoOnLoop
from medsam2.training.memory import LastBatch
from medsam2.training.module import FineTuner
from medsam2.training.optim import HEADINGS, TrainingRow, parameter_groups, training_table
from medsam2.training.pictures import Pictures
from medsam2.training.ranks import owned_ranks
from medsam2.training.report import RunReport
from medsam2.training.settings import PhaseSettings, TrainSettings
from medsam2.training.signals import listening
from medsam2.training.starts import OnSchedule, global_batch_of, peek, say_how_it_goes_on, starting_model, step_of
from medsam2.training.step_clock import StepClock
from medsam2.training.stopping import Stopping


@listening()
@owned_ranks()
def fit(config: dict[str, Any]) -> Path:
    """Run a recipe, or each phase of a curriculum; returns the folder of the (last) run.

    Args:
        config: the composed configuration, plain values.

    Raises:
        UserError: the configuration is invalid, or a path is wrong.
    """
    settings = validate(TrainSettings, config, "the training configuration")
    if settings.mode == "check":
        return check_all(config, settings)
    if not settings.phases:
        return fit_one(settings)
    refuse_taken(settings)
    plans = [(phase, phase_settings(config, settings, phase)) for phase in settings.phases]
    start, folder = settings.start, Path(settings.output)
    for phase, planned in plans:
        folder = Path(planned.output)
        if (folder / "done").exists():
            announce(f"phase {phase.name}: already done in {folder}")
        else:
            announce(f"phase {phase.name}: {planned.trainer.max_steps} steps from {start} into {folder}")
            fit_one(planned.model_copy(update={"start": start}))
            (folder / "done").touch()
        start = str(folder / "checkpoints" / "last.ckpt")
    return folder


def check_all(config: dict[str, Any], settings: TrainSettings) -> Path:
    """`mode=check`: the run, or each phase of a curriculum from the weights of the first; nothing is written."""
    from medsam2.training.check import check  # it asks this file for the parts of a run

    for phase in settings.phases:
        check(phase_settings(config, settings, phase).model_copy(update={"start": settings.start}), phase.name)
    if not settings.phases:
        check(settings)
    return Path(settings.output)


@rank_zero_only
def announce(text: str) -> None:
    print(text, flush=True)


def phase_settings(config: dict[str, Any], settings: TrainSettings, phase: PhaseSettings) -> TrainSettings:
    """The run's configuration with the phase's differences; phases resume by themselves."""
    merged = merge({**config, "phases": []}, phase.override)
    merged["output"] = str(Path(settings.output) / phase.name)
    merged["resume"] = "auto"
    return validate(TrainSettings, merged, f"phase {phase.name!r}")


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """`override` laid over `base`, dictionary by dictionary."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def fit_one(settings: TrainSettings) -> Path:
    """Build model, data, module, callbacks and trainer, in that order, and fit."""
    quiet_lightning()
    L.seed_everything(settings.seed, workers=True, verbose=False)
    if settings.trainer.threads:
        torch.set_num_threads(settings.trainer.threads)
        cv2.setNumThreads(settings.trainer.threads)  # augmentation on a CPU
    module_class = find_module(settings.module)
    allow_open_files(settings.data.workers if module_class.needs_data else 0)
    resume = resume_path(settings)
    if settings.trainer.auto_batch:
        refuse_taken(settings)  # before the work, not after it
        settings = with_largest_batch(settings, module_class, global_batch_of(resume) if resume else None)
    loaded = starting_model(settings)
    apply_adaptation(loaded.sam, settings.adaptation)
    data = TrainingData(settings, loaded.spec.image_size) if module_class.needs_data else None
    module = (
        module_class(loaded, settings, tuple(data.content_hashes()), data.provenance())
        if data
        else module_class(loaded, settings)
    )
    folder = open_folder(settings)
    report(training_table(loaded.sam, parameter_groups(loaded.sam, settings.optim)), data)
    validated = data is not None and (settings.validation.cases > 0 or settings.validation.clips > 0)
    trainer = make_trainer(settings, folder, resume, validated)
    if resume is not None:
        refuse_other_run(resume, trainer, module, data)
        say_how_it_goes_on(resume, settings, validated)
    run(trainer, module, data, resume, settings)
    return folder


def refuse_other_run(path: Path, trainer: L.Trainer, module: FineTuner, data: TrainingData | None) -> None:
    """Compare run and checkpoint before any other rank is started: one message, and nothing to end.

    Raises:
        UserError: the checkpoint is of another model, seed, data or batch.
    """
    checkpoint = peek(path)
    module.on_load_checkpoint(checkpoint)
    if data is not None:
        data.trainer = trainer  # the global batch follows from its ranks
        data.load_state_dict(checkpoint.get(type(data).__qualname__, {}))


def run(
    trainer: L.Trainer, module: FineTuner, data: TrainingData | None, resume: Path | None, settings: TrainSettings
) -> None:
    """`trainer.fit`, after which no rank is left behind, however it ends."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except SIGTERMException as stopped:
        raise leave_stopped(stopped, settings, trainer.global_rank) from None
    except Exception as error:
        known = explained(error, settings, trainer, Path(settings.output))
        if known is error:
            raise
        raise known from (error if isinstance(known, UserError) else None)


def find_module(path: str) -> type[FineTuner]:
    """The LightningModule class at a dotted path.

    Raises:
        UserError: no such class, or it is not a `FineTuner`.
    """
    package, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"module={path} cannot be imported: {error}; give package.module.Class.") from None
    if not (isinstance(found, type) and issubclass(found, FineTuner)):
        raise UserError(f"module={path} is not a subclass of medsam2.training.module.FineTuner.")
    return found


def open_folder(settings: TrainSettings) -> Path:
    """The run folder; refused if it is taken and nothing is resumed."""
    refuse_taken(settings)
    folder = new_folder(settings.output, force=settings.resume is not None)
    sweep(folder)
    return folder


@rank_zero_only  # the other ranks start when the first has begun to fill the folder
def refuse_taken(settings: TrainSettings) -> None:
    """Nothing of an earlier run is gone on with, or written over, unless it is asked for.

    Raises:
        UserError: the folder holds a run and `resume` is not given.
    """
    folder = Path(settings.output)
    taken = folder.is_dir() and any(folder.iterdir())
    if taken and settings.resume is None:
        raise UserError(
            f"output={folder} already exists and is not empty; choose another folder, remove it, "
            "or go on with its run by resume=auto."
        )


@explain_launch
def make_trainer(settings: TrainSettings, folder: Path, resume: Path | None, validated: bool) -> L.Trainer:
    """Lightning's Trainer with our loggers, callbacks and checkpoint writer."""
    own, used = settings.trainer, callbacks(settings, folder, resume)
    trainer = L.Trainer(
        accelerator=own.accelerator,
        devices=own.devices,
        num_nodes=own.num_nodes,
        strategy=own.strategy,
        precision=own.precision,  # type: ignore[arg-type]
        max_steps=own.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=own.accumulate,
        val_check_interval=own.val_every * own.accumulate if validated else None,
        check_val_every_n_epoch=None,
        limit_val_batches=None if validated else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=own.log_every,
        gradient_clip_val=settings.optim.clip,
        deterministic=own.deterministic,
        detect_anomaly=own.detect_anomaly,
        profiler=own.profiler,
        logger=loggers(settings, folder, resume),
        callbacks=used,
        plugins=[AtomicCheckpointIO(), *launch_plugins(settings)],
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in used),
        default_root_dir=folder,
    )
    last = next(callback for callback in used if isinstance(callback, LastCheckpoint))
    trainer.fit_loop = GoOnLoop(trainer, lambda: validated and last.owes_validation(trainer.global_step))
    return made_to_end_well(trainer, settings)


def callbacks(settings: TrainSettings, folder: Path, resume: Path | None) -> list[Callback]:
    """Description of the run, checkpoints, rates, throughput, progress, and the moving average where asked for.

    Events look at the earlier configuration, which the description replaces; pictures are drawn before the moving
    average gives way to the weights of the step; the report comes last, when all else is written.
    """
    step, stopping = step_of(resume) if resume else None, Stopping()
    found: list[Callback] = [
        Events(settings, folder, resume),
        Description(settings, folder),
        StepClock(),
        LastBatch(),
        stopping,
        Guard(settings, folder, stopping),
        OnSchedule(),
        *checkpoint_callbacks(settings, stopping),
        LossByKind(settings.trainer.log_every),
        Throughput(settings.trainer.log_every),
        ValidationTable(folder, step),
    ]
    if settings.validation.cases and settings.validation.pictures:
        found.append(Pictures(folder, settings.validation.pictures, step))
    if settings.ema is not None:
        found.append(EmaAverage(settings.ema))
    return [LearningRateMonitor("step"), *found, *progress_callbacks(settings), RunReport(folder)]


def loggers(settings: TrainSettings, folder: Path, resume: Path | None) -> list[Logger]:
    """The loggers by name; they go on after a resume."""
    return make_loggers(settings, folder, step_of(resume) if resume else None)


@rank_zero_only
def report(rows: list[TrainingRow], data: ClipDataModule | None) -> None:
    """Print what is trained and how, and the expected share of each data set."""
    console = Console()
    table = Table(title="Trainable parameters", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "module" else "right")
    for row in rows:
        table.add_row(*row.cells())
    console.print(table)
    if data is not None:
        console.print(shares_table(data.expected_shares()))


def shares_table(rows: list[ShareRow]) -> Table:
    """What the mixture gives each data set, and all data sets of a modality where there are several."""
    table = Table(title="Training data (expected)", title_justify="left")
    for heading in ("data set", "modality", "batches of", "cases", "segments", "share of clips", "passes an epoch"):
        table.add_column(heading, justify="left" if heading in ("data set", "modality", "batches of") else "right")
    for row in rows:
        numbers = (str(row.cases), str(row.segments), f"{row.share:.1%}", f"{row.passes_per_epoch:.2g}")
        table.add_row(row.source, row.modality, row.kind, *numbers)
    modalities = dict.fromkeys(row.modality for row in rows)
    if 1 < len(modalities) < len(rows):
        table.add_section()
        for modality in modalities:
            share = sum(row.share for row in rows if row.modality == modality)
            table.add_row("all", modality, "", "", "", f"{share:.1%}", "")
    return table


def quiet_lightning() -> None:
    """Silence advice that does not apply here; warnings about the user's run stay."""
    for name in ("lightning.pytorch", "lightning.fabric.utilities.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*no `val_dataloader`.*",
        ".*Checkpoint directory .* exists.*",
        ".*treespec.*",
        ".*sync_dist=True.*",  # every rank logs the same figures, from rows that were gathered
        ".*all_gather is deprecated.*",
        ".*Grad strides do not match bucket view strides.*",  # of depthwise kernels, small
    ):
        warnings.filterwarnings("ignore", message)
