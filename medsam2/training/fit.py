"""One run: settings in, a run folder with checkpoints, curves and configuration out."""

from __future__ import annotations

import importlib
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, LearningRateMonitor, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from medsam2.config import validate
from medsam2.data.datamodule import ClipDataModule
from medsam2.errors import UserError
from medsam2.files import new_folder
from medsam2.model.adaptation import ModuleShare, apply_adaptation
from medsam2.model.build import LoadedModel, ModelSpec, build_sam, load_model
from medsam2.training.cases import TrainingData
from medsam2.training.checkpoints import AtomicCheckpointIO, checkpoint_callbacks, resume_path
from medsam2.training.log import CsvLog, Description, Throughput, progress_callbacks
from medsam2.training.module import FineTuner
from medsam2.training.settings import PhaseSettings, TrainSettings


def fit(config: dict[str, Any]) -> Path:
    """Run a recipe, or each phase of a curriculum; returns the folder of the (last) run.

    Args:
        config: the composed configuration, plain values.

    Raises:
        UserError: the configuration is invalid, or a path is wrong.
    """
    settings = validate(TrainSettings, config, "the training configuration")
    if not settings.phases:
        return fit_one(settings)
    refuse_taken(settings)
    plans = [(phase, phase_settings(config, settings, phase)) for phase in settings.phases]
    start, folder = settings.start, Path(settings.output)
    for phase, planned in plans:
        folder = Path(planned.output)
        if (folder / "done").exists():
            print(f"phase {phase.name}: already done in {folder}")
        else:
            print(f"phase {phase.name}: {planned.trainer.max_steps} steps from {start} into {folder}", flush=True)
            fit_one(planned.model_copy(update={"start": start}))
            (folder / "done").touch()
        start = str(folder / "checkpoints" / "last.ckpt")
    return folder


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
    module_class = find_module(settings.module)
    resume = resume_path(settings)
    loaded = starting_model(settings)
    shares = apply_adaptation(loaded.sam, settings.adaptation)
    data = TrainingData(settings, loaded.spec.image_size) if module_class.needs_data else None
    module = (
        module_class(loaded, settings, tuple(data.content_hashes()), data.provenance())
        if data
        else module_class(loaded, settings)
    )
    folder = open_folder(settings)
    report(shares, data)
    trainer = make_trainer(settings, folder, resume, validate_cases=data is not None and settings.validation.cases > 0)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return folder


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


def starting_model(settings: TrainSettings) -> LoadedModel:
    """Random weights of `model`, or those of a checkpoint (whose size must be `model`'s)."""
    spec = ModelSpec(settings.model.name, settings.model.version, settings.model.image_size)
    if settings.start == "random":
        return LoadedModel(build_sam(spec), spec, {}, "random")
    return load_model(settings.start, spec)


def open_folder(settings: TrainSettings) -> Path:
    """The run folder; refused if it is taken and nothing is resumed."""
    refuse_taken(settings)
    return new_folder(settings.output, force=settings.resume is not None)


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


def make_trainer(settings: TrainSettings, folder: Path, resume: Path | None, validate_cases: bool) -> L.Trainer:
    """Lightning's Trainer with our loggers, callbacks and checkpoint writer."""
    own, used = settings.trainer, callbacks(settings, folder)
    return L.Trainer(
        accelerator=own.accelerator,
        devices=own.devices,
        num_nodes=own.num_nodes,
        strategy=own.strategy,
        precision=own.precision,  # type: ignore[arg-type]
        max_steps=own.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=own.accumulate,
        val_check_interval=own.val_every * own.accumulate if validate_cases else None,
        check_val_every_n_epoch=None,
        limit_val_batches=None if validate_cases else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=own.log_every,
        gradient_clip_val=settings.optim.clip,
        deterministic=own.deterministic,
        detect_anomaly=own.detect_anomaly,
        profiler=own.profiler,
        logger=loggers(settings, folder, resume),
        callbacks=used,
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in used),
        default_root_dir=folder,
    )


def callbacks(settings: TrainSettings, folder: Path) -> list[Callback]:
    """Description of the run, checkpoints, rates, throughput, progress, and the moving average where asked for."""
    found: list[Callback] = [
        Description(settings, folder),
        *checkpoint_callbacks(settings),
        Throughput(settings.data.clips_per_batch, settings.trainer.log_every),
    ]
    if settings.ema is not None:
        found.append(EMAWeightAveraging(decay=settings.ema))
    return [LearningRateMonitor("step"), *found, *progress_callbacks(settings)]


def loggers(settings: TrainSettings, folder: Path, resume: Path | None) -> list[Logger]:
    """The loggers by name; metrics.csv goes on after a resume."""
    found: list[Logger] = []
    for name in settings.logger:
        if name == "csv":
            found.append(CsvLog(folder / "metrics.csv", step_of(resume) if resume else None))
        else:
            from lightning.pytorch.loggers import WandbLogger

            found.append(WandbLogger(save_dir=folder, project="medsam2", name=folder.name))
    return found


def step_of(checkpoint: Path) -> int:
    """The optimiser step at which a checkpoint was written."""
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])


@rank_zero_only
def report(shares: list[ModuleShare], data: ClipDataModule | None) -> None:
    """Print what is trained, and the expected share of each data set."""
    console = Console()
    table = Table(title="Trainable parameters", title_justify="left")
    for heading in ("module", "parameters", "trained"):
        table.add_column(heading, justify="left" if heading == "module" else "right")
    for row in shares:
        table.add_row(row.module, f"{row.parameters:,}", f"{row.trained:,}")
    console.print(table)
    if data is not None:
        table = Table(title="Training data", title_justify="left")
        for heading in ("data set", "modality", "cases", "segments", "share of clips"):
            table.add_column(heading, justify="left" if heading in ("data set", "modality") else "right")
        for share, found in zip(data.expected_shares(), data.statistics(), strict=True):
            table.add_row(
                found["source"], found["modality"], str(found["cases"]), str(found["segments"]), f"{share.share:.1%}"
            )
        console.print(table)


def quiet_lightning() -> None:
    """Silence advice that does not apply here; warnings about the user's run stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*no `val_dataloader`.*",
        ".*Checkpoint directory .* exists.*",
        ".*treespec.*",
    ):
        warnings.filterwarnings("ignore", message)
