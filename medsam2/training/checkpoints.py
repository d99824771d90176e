"""Checkpoints on disk: whole or absent, with the last good one kept (FAULTS rows 2, 3 and 6)."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from medsam2.errors import UserError
from medsam2.files import atomic_write
from medsam2.training.settings import TrainSettings
from medsam2.training.tradeoff import best_monitor

LAST, PREVIOUS, BEST = "last", "previous", "best"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, fsyncs and renames; `last.ckpt` becomes `previous.ckpt` before it is replaced.

    Lightning's own save goes through fsspec's temporary file in TMPDIR and a move, which is not atomic where
    TMPDIR is another file system than the run folder.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            torch.save(checkpoint, file)
            if path.stem == LAST and path.exists():
                os.replace(path, path.with_stem(PREVIOUS))


class LastCheckpoint(ModelCheckpoint):
    """`last.ckpt` every so many steps, and of the last step whatever its number."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step == trainer.max_steps != self._last_global_step_saved:
            trainer.save_checkpoint(Path(str(self.dirpath)) / f"{LAST}.ckpt")


def checkpoint_callbacks(settings: TrainSettings) -> list[Callback]:
    """`last.ckpt` every `checkpoint_every` steps and at the end, `best.ckpt` by mean DSC, else by `val/loss`."""
    folder = Path(settings.output) / "checkpoints"
    common: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False, "save_on_train_epoch_end": False}
    every = min(settings.trainer.checkpoint_every, settings.trainer.max_steps)
    last = LastCheckpoint(filename=LAST, every_n_train_steps=every, **common)
    if not settings.validation.cases and not settings.validation.clips:
        return [last]
    monitor, mode = best_monitor(settings.validation.tradeoff, settings.validation.cases)
    best = ModelCheckpoint(filename=BEST, monitor=monitor, mode=mode, **common)
    return [last, best]


def resume_path(settings: TrainSettings) -> Path | None:
    """The checkpoint to go on from: None for a new run. `auto` takes the last one, or the one before if it is damaged.

    Raises:
        UserError: a path that does not exist.
    """
    if settings.resume is None:
        return None
    if settings.resume != "auto":
        path = Path(settings.resume)
        if not path.is_file():
            raise UserError(f"resume={path} does not exist; give a .ckpt file of the run, or resume=auto.")
        return path
    for name in (LAST, PREVIOUS):
        path = Path(settings.output) / "checkpoints" / f"{name}.ckpt"
        if path.exists() and intact(path):
            return path
        if path.exists():
            rank_zero_warn(f"{path} is damaged; trying the checkpoint before it.")
    return None


def intact(path: Path) -> bool:
    """Whether every member of a checkpoint (a zip archive) has the checksum that was written with it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False
