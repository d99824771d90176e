"""Write checkpoints atomically, keep the last good one, and find the one to resume from."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from medsam2.errors import UserError
from medsam2.files import atomic_write
from medsam2.model.checkpoint import is_intact
from medsam2.training.callbacks.validation import best_monitor
from medsam2.training.launch.signals import NONE
from medsam2.training.launch.stopping import Stopping
from medsam2.training.loggers.csv_log import CsvLog
from medsam2.training.settings import TrainSettings

LAST, PREVIOUS, BEST = "last", "previous", "best"
FOLDER, PARTIAL, LOCK = "checkpoints", ".*.partial*", ".lock"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, fsyncs and renames; `last.ckpt` becomes `previous.ckpt` before it is replaced.

    Lightning's own save goes through fsspec's temporary file in TMPDIR and a move, which is not atomic where
    TMPDIR is another file system than the run folder.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises UserError where the disk is full: nothing is left of the attempt, earlier checkpoints stay."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        needed = checkpoint_bytes(checkpoint)
        refuse_full(path, needed)
        try:
            with atomic_write(path) as file:
                torch.save(checkpoint, file)
                if path.stem == LAST and path.exists():
                    file.flush()
                    os.fsync(file.fileno())  # from here on only the renames are left
                    os.replace(path, path.with_stem(PREVIOUS))
        except (OSError, RuntimeError):  # torch reports a write that failed as RuntimeError
            refuse_full(path, needed)
            raise


def checkpoint_bytes(content: Any) -> int:
    """Sum the bytes of all tensors in a checkpoint, which is its size on disk up to a few kilobytes."""
    return sum(leaf.nbytes for leaf in tree_leaves(content) if isinstance(leaf, Tensor))


def refuse_full(path: Path, needed: int) -> None:
    """Raises UserError where a checkpoint of `needed` bytes does not fit on the disk of `path`."""
    free = shutil.disk_usage(path.parent).free
    if free > needed:
        return
    intact = [name for name in (LAST, PREVIOUS) if path.with_stem(name).exists()]
    earlier = (
        f"{' and '.join(f'{name}.ckpt' for name in intact)} of before are intact" if intact else "none was saved yet"
    )
    raise UserError(
        f"no space to save {path.name} in {path.parent}: {needed / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are "
        f"free; {earlier}. Make room, then go on with resume=auto."
    )


# ------------------------------------------------------------------------------------------- when they are saved


class LastCheckpoint(Checkpoint):
    """`last.ckpt` every so many steps, before each validation, of the last step, and where the run is stopped.

    Saved before a validation, it makes one that is interrupted cost nothing but itself: a resumed run repeats it
    (`validation_pending`).

    Args:
        folder: of the checkpoints. every: in steps. val_every: steps between validations, None where there is none.
        stopping: what the ranks have agreed on.
    """

    def __init__(self, folder: Path, every: int, val_every: int | None, stopping: Stopping) -> None:
        self.path, self.every, self.val_every, self.stopping = folder / f"{LAST}.ckpt", every, val_every, stopping
        self.saved = self.validated = 0  # steps

    def state_dict(self) -> dict[str, Any]:
        return {"validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validated = int(state_dict["validated"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step, stopped = trainer.global_step, self.stopping.level != NONE
        due = step % self.every == 0 or step == trainer.max_steps or validation_pending(step, 0, self.val_every)
        if (due or stopped) and step != self.saved:
            self.saved = step
            log_step(trainer, all_loggers=stopped)
            trainer.save_checkpoint(self.path)
        self.stopping.stop()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated = trainer.global_step

    def validation_pending(self, step: int) -> bool:
        """Whether the run was interrupted between this step and the end of its validation."""
        return validation_pending(step, self.validated, self.val_every)


def validation_pending(step: int, validated: int, val_every: int | None) -> bool:
    """Whether a validation follows this step and has not been finished."""
    return val_every is not None and step > 0 and step % val_every == 0 and validated != step


def validated_at(checkpoint: Mapping[str, Any]) -> int:
    """Return the step of the last validation that was finished before this checkpoint was saved; 0 for none."""
    return int(checkpoint.get("callbacks", {}).get(LastCheckpoint.__qualname__, {}).get("validated", 0))


def log_step(trainer: L.Trainer, all_loggers: bool) -> None:
    """Put this step's row on disk before its checkpoint: Lightning logs it later, and a kill between would lose it.

    The row is only in Lightning's private connector at this moment.

    Args:
        all_loggers: the run ends here, and no later comes.
    """
    connector = trainer._logger_connector
    if all_loggers:
        connector.update_train_step_metrics()
        return
    row = connector.metrics["log"] if connector.should_update_logs else {}
    for logger in trainer.loggers:
        if isinstance(logger, CsvLog):
            values = {name: float(value) for name, value in row.items()}
            if values:
                logger.log_metrics(values, trainer.fit_loop.epoch_loop._batches_that_stepped)
            logger.save()


def checkpoint_callbacks(settings: TrainSettings, stopping: Stopping | None = None) -> list[Callback]:
    """`last.ckpt` every `checkpoint_every` steps and at the end, `best.ckpt` by mean DSC, else by `val/loss`.

    Early stopping goes by the same figure.
    """
    folder, trainer, validation = Path(settings.output) / FOLDER, settings.trainer, settings.validation
    scored = bool(validation.cases or validation.clips)
    val_every = trainer.val_every if scored else None
    last = LastCheckpoint(folder, trainer.checkpoint_every, val_every, stopping or Stopping())
    if not scored:
        return [last]
    monitor, mode = best_monitor(validation.tradeoff, validation.cases)
    best = ModelCheckpoint(
        filename=BEST, monitor=monitor, mode=mode, dirpath=folder, enable_version_counter=False,
        save_on_train_epoch_end=False,
    )  # fmt: skip
    if validation.patience is None:
        return [last, best]
    return [last, best, EarlyStopping(monitor, patience=validation.patience, mode=mode, check_finite=False)]


# ------------------------------------------------------------------------------------------- where a run goes on


def resume_path(settings: TrainSettings) -> Path | None:
    """The checkpoint to go on from: None for a new run. `auto` takes the last one, or the one before if it is damaged.

    Raises:
        UserError: a path that does not exist, or no checkpoint of the folder is whole.
    """
    if settings.resume is None:
        return None
    if settings.resume != "auto":
        path = Path(settings.resume)
        if not path.is_file():
            raise UserError(f"resume={path} does not exist; give a .ckpt file of the run, or resume=auto.")
        return path
    folder = Path(settings.output) / FOLDER
    paths = [path for path in (folder / f"{name}.ckpt" for name in (LAST, PREVIOUS)) if path.exists()]
    for path in paths:
        if is_intact(path):
            return path
        rank_zero_warn(f"{path} is damaged; trying the checkpoint before it.")
    if not paths:
        return None
    best = folder / f"{BEST}.ckpt"
    remedy = f"begin a new run from {best} by start={best} in another folder" if best.exists() else "remove the folder"
    raise UserError(f"resume=auto: {' and '.join(map(str, paths))} cannot be read; restore one of them, or {remedy}.")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the run folder, keep other runs out of it while this one lasts, and remove what a killed one left half done.

    The lock is rank 0's. It goes with its process, and data workers, which may outlive that for seconds, have no part
    in it. A file system without locks is used without.

    Raises:
        UserError: another run holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if rank_zero_only.rank:  # type: ignore[attr-defined]  # Lightning sets it on the function
        yield
        return
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"another process is training into output={folder}; wait until it ends, or choose another folder."
            ) from None
        except OSError as error:
            rank_zero_warn(f"{folder} cannot be locked ({error.strerror}): start no second run in it.")
        sweep(folder)
        yield


def sweep(folder: Path) -> None:
    """Remove the unfinished files of a run that was killed."""
    for place in (folder, folder / FOLDER):
        for path in place.glob(PARTIAL):
            path.unlink(missing_ok=True)
