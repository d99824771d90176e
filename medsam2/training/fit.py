"""One run: settings in, a run folder with checkpoints, curves and configuration out."""

from __future__ import annotations

import logging
import pkgutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import cv2
import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from medsam2.adaptation.freeze import apply_adaptation
from medsam2.config import validate
from medsam2.data.datamodule import ClipDataModule
from medsam2.data.plan.plan import ShareRow
from medsam2.errors import UserError
from medsam2.model.build import LoadedModel
from medsam2.reporting.tables import Table, numbers, print_table, words
from medsam2.training.callbacks.log import Description, LossByKind, RunReport, ValidationTable, progress_callbacks
from medsam2.training.callbacks.pictures import Pictures
from medsam2.training.callbacks.validation import InterpolateAtEnd
from medsam2.training.cases import TrainingData
from medsam2.training.launch.limits import LastBatch, allow_open_files
from medsam2.training.launch.ranks import explain_launch_errors, launch_plugins, make_strategy, refuse_other_world_size
from medsam2.training.launch.shutdown import clean_shutdown, install_shutdown, watch_rank_zero
from medsam2.training.launch.signals import signals_handled
from medsam2.training.launch.stopping import Guard, Stopping
from medsam2.training.loggers.csv_log import FILE as METRICS
from medsam2.training.loggers.csv_log import CsvLog
from medsam2.training.module import FineTuner
from medsam2.training.optim import HEADINGS, training_table
from medsam2.training.retention import EmaAverage
from medsam2.training.run_folder.checkpoints import (
    LOCK,
    AtomicCheckpointIO,
    LastCheckpoint,
    checkpoint_callbacks,
    locked,
    resume_path,
)
from medsam2.training.run_folder.events import Events, is_finished
from medsam2.training.run_folder.resume import ResumeValidationLoop, StepClock, announce_resume, peek, starting_model
from medsam2.training.settings import TrainSettings

T = TypeVar("T")


@signals_handled()
def fit(config: dict[str, Any]) -> Path:
    """Run a recipe: build model, data, module, callbacks and trainer, in that order, and fit; returns the run folder.

    Args:
        config: the composed configuration, plain values.

    Raises:
        UserError: the configuration is invalid, or a path is wrong.
    """
    watch_rank_zero()
    settings = validate(TrainSettings, config, "the training configuration")
    prepare_process(settings)
    refuse_existing_run(settings)
    module_class = find_module(settings.module)
    allow_open_files(settings.data.workers if module_class.needs_data else 0)
    resume = resume_path(settings)
    loaded = starting_model(settings)
    apply_adaptation(loaded.sam, settings.adaptation)
    data = TrainingData(settings, loaded.spec.image_size) if module_class.needs_data else None
    module = make_module(module_class, loaded, settings, data)
    report(training_table(loaded.sam, settings.optim), data)
    folder = Path(settings.output)
    validated = data is not None and (settings.validation.cases > 0 or settings.validation.clips > 0)
    trainer = make_trainer(settings, folder, resume, validated)
    if resume is not None:
        refuse_other_run(resume, trainer, module, data)
        if is_finished(resume, settings, validated):
            return folder
        announce_resume(resume, settings)
    with locked(folder), clean_shutdown(settings, trainer):
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return folder


def prepare_process(settings: TrainSettings) -> None:
    """Seeds, threads and the warnings of this process."""
    quiet_lightning()
    L.seed_everything(settings.seed, workers=True, verbose=False)
    if settings.trainer.threads:
        torch.set_num_threads(settings.trainer.threads)
        cv2.setNumThreads(settings.trainer.threads)  # augmentation on a CPU


def make_module(
    module_class: type[FineTuner], loaded: LoadedModel, settings: TrainSettings, data: TrainingData | None
) -> FineTuner:
    """Build the LightningModule, with hashes and licences of the training cases for its checkpoints."""
    if data is None:
        return module_class(loaded, settings)
    return module_class(loaded, settings, tuple(data.content_hashes()), data.provenance())


def refuse_other_run(path: Path, trainer: L.Trainer, module: FineTuner, data: TrainingData | None) -> None:
    """Compare run and checkpoint before other ranks start, so that an error is printed once.

    Args:
        trainer: of the run; the global batch follows from its ranks.

    Raises:
        UserError: the checkpoint is of another model, seed, data or batch.
    """
    checkpoint = peek(path)
    module.on_load_checkpoint(checkpoint)
    if data is not None:
        data.trainer = trainer
        data.load_state_dict(checkpoint.get(type(data).__qualname__, {}))


def find_module(path: str) -> type[FineTuner]:
    """The LightningModule class at a dotted path.

    Raises:
        UserError: no such class, or it is not a `FineTuner`.
    """
    try:
        module_class = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"module={path} cannot be imported: {error}; give package.module.Class.") from None
    if not (isinstance(module_class, type) and issubclass(module_class, FineTuner)):
        raise UserError(f"module={path} is not a subclass of medsam2.training.module.FineTuner.")
    return module_class


@rank_zero_only  # the other ranks start when the first has begun to fill the folder
def refuse_existing_run(settings: TrainSettings) -> None:
    """Refuse an output folder that holds a run, unless it is to be resumed.

    Raises:
        UserError: the folder holds a run and `resume` is not given, or it is a file.
    """
    folder = Path(settings.output)
    if folder.is_file():
        raise UserError(f"output={folder} is a file; give a folder that does not exist yet.")
    if settings.resume is None and folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        raise UserError(
            f"output={folder} already exists and is not empty; choose another folder, remove it, "
            "or go on with its run by resume=auto."
        )


def make_trainer(settings: TrainSettings, folder: Path, resume: Path | None, validated: bool) -> L.Trainer:
    """Lightning's Trainer with our loggers, callbacks, checkpoint writer, signals and ranks.

    Raises:
        UserError: devices, nodes or the launch do not fit this machine, or a logger cannot be made.
    """
    run = settings.trainer
    run_callbacks = callbacks(settings, folder, resume, validated)
    with explain_launch_errors():
        trainer = L.Trainer(
            accelerator=run.accelerator,
            devices=run.devices,
            num_nodes=run.num_nodes,
            strategy=make_strategy(run.strategy, run.timeout_minutes),
            precision=run.precision,  # type: ignore[arg-type]
            max_steps=run.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=run.accumulate,
            val_check_interval=run.val_every * run.accumulate if validated else None,
            check_val_every_n_epoch=None,
            limit_val_batches=None if validated else 0,
            num_sanity_val_steps=0,
            log_every_n_steps=run.log_every,
            gradient_clip_val=settings.optim.clip,
            deterministic=settings.deterministic,
            detect_anomaly=run.detect_anomaly,
            profiler=run.profiler,
            logger=make_loggers(settings, folder, peek(resume)["global_step"] if resume else None),
            callbacks=run_callbacks,
            plugins=[AtomicCheckpointIO(), *launch_plugins(run.num_nodes)],
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in run_callbacks),
            default_root_dir=folder,
        )
    refuse_other_world_size(trainer)
    last = next(callback for callback in run_callbacks if isinstance(callback, LastCheckpoint))
    trainer.fit_loop = ResumeValidationLoop(trainer, lambda: validated and last.validation_pending(trainer.global_step))
    install_shutdown(trainer)
    return trainer


def make_loggers(settings: TrainSettings, folder: Path, resumed_step: int | None) -> list[Logger]:
    """metrics.csv, then the loggers of `settings.logger`; nothing is written before something is logged.

    A logger with a method `log_pictures(pictures, step)` is given the pictures of each validation, on rank 0.

    Args:
        resumed_step: the run goes on from there; None: it is new.

    Raises:
        UserError: a class cannot be imported or made; a package may be missing.
    """
    loggers = instantiate_group("logger", settings.logger, Logger)  # type: ignore[type-abstract]
    return [CsvLog(folder / METRICS, resumed_step), *loggers]


def instantiate_group(group: str, entries: Mapping[str, Any], kind: type[T]) -> list[T]:
    """The objects that the entries of a configuration group name by `_target_`, in order.

    Raises:
        UserError: a class cannot be imported or made, or it is not a `kind`; a package may be missing.
    """
    instances = []
    for name, entry in entries.items():
        from hydra.utils import instantiate

        hint = f"see configs/{group}/ and docs/how-to/watch-a-run.md."
        try:
            instance = instantiate(entry)
        except Exception as error:  # of Hydra, or whatever the class raises
            reason = str(error.__cause__ or error).splitlines()[0]
            raise UserError(f"{group}.{name}: {reason}; {hint}") from None
        if not isinstance(instance, kind):
            raise UserError(
                f"{group}.{name} is a {type(instance).__name__} and not a Lightning {kind.__name__}; {hint}"
            )
        instances.append(instance)
    return instances


def callbacks(settings: TrainSettings, folder: Path, resume: Path | None, validated: bool) -> list[Callback]:
    """Description of the run, checkpoints, those of `settings.callbacks`, progress, the moving average if asked for.

    Events look at the earlier configuration, which the description replaces; pictures are drawn before the moving
    average gives way to the weights of the step, and interpolated towards it at the end; the report comes last, when
    all else is written.
    """
    stopping = Stopping()
    run_callbacks: list[Callback] = [
        Events(settings, folder, resume),
        Description(settings, folder),
        StepClock(),
        LastBatch(),
        stopping,
        Guard(settings.trainer.max_bad_steps, stopping),
        *checkpoint_callbacks(settings, stopping),
        LossByKind(settings.trainer.log_every),
        *instantiate_group("callbacks", settings.callbacks, Callback),
        ValidationTable(folder),
    ]
    if settings.validation.cases and settings.validation.pictures:
        run_callbacks.append(Pictures(folder, settings.validation.pictures))
    if settings.ema is not None:
        run_callbacks.append(EmaAverage(settings.ema))
    if settings.retention.interpolate and validated:
        run_callbacks.append(InterpolateAtEnd(settings))
    return [*run_callbacks, *progress_callbacks(settings), RunReport(folder)]


@rank_zero_only
def report(rows: list[tuple[str, ...]], data: ClipDataModule | None) -> None:
    """Print what is trained and how, and the expected share of each data set."""
    print_table(Table("Trainable parameters", words(*HEADINGS), tuple(rows)))
    if data is not None:
        print_table(shares_table(data.expected_shares()))


def shares_table(rows: list[ShareRow]) -> Table:
    """What the mixture gives each dataset."""
    columns = (*words("dataset", "modality", "batches of"), *numbers("cases", "segments", "share"))
    lines = []
    for row in rows:
        share, passes = f"{row.share:.1%}", f"{row.passes_per_epoch:.2g}"
        lines.append((row.source, row.modality, row.kind, row.cases, row.segments, share, passes))
    return Table("Training data (expected share of clips)", (*columns, *numbers("passes per epoch")), tuple(lines))


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
