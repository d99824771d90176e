"""All ranks stop at the same step when a signal has reached one of them, and leave with the right status."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from medsam2.training.signals import NAMES, NONE, WARNED, exit_status, heard

SCONTROL_SECONDS = 60.0  # scontrol waits for the controller


class Stopped(SIGTERMException):
    """The run ends here because of a signal; what it has done is in `last.ckpt`.

    Attributes:
        level: what was heard (`signals.INTERRUPT`, TERMINATE or WARNED), the same on all ranks.
    """

    def __init__(self, level: int) -> None:
        super().__init__(f"{NAMES[level]}; the run goes on with resume=auto")
        self.level = level

    def __str__(self) -> str:
        return str(self.code)


class Stopping(Callback):
    """What the ranks have agreed on. `Guard` asks in each optimiser step, with the number that it sends anyway.

    Between steps a stop is asked for here: before the first one, and after each case of a validation. Nothing has to
    be saved there, since `last.ckpt` is written before a validation begins.
    """

    def __init__(self) -> None:
        self.level = NONE

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._ask(trainer)

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        self._ask(trainer)

    def _ask(self, trainer: L.Trainer) -> None:
        self.agree(int(largest(trainer, [heard()])[0]))
        self.stop()

    def agree(self, level: int) -> None:
        """Note what all ranks know."""
        self.level = max(self.level, level)

    def stop(self) -> None:
        """End the run where a stop is agreed on.

        Raises:
            Stopped: on all ranks.
        """
        if self.level != NONE:
            raise Stopped(self.level)


def largest(trainer: L.Trainer, numbers: list[float]) -> list[float]:
    """The largest of each number over all ranks, in one exchange."""
    if trainer.world_size == 1:
        return numbers
    sent = torch.tensor(numbers, dtype=torch.float32, device=trainer.strategy.root_device)
    reduced: list[float] = trainer.strategy.reduce(sent, reduce_op="max").tolist()
    return reduced


def status_after_stop(requeue: Literal["auto"] | bool, level: int, rank: int) -> int:
    """The exit status of a rank of a stopped run; rank 0 asks SLURM to queue the job again before it leaves.

    `auto` requeues on SIGUSR1 alone, the warning ahead of the time limit (`sbatch --signal=USR1@120`): SIGTERM comes
    from scancel, which means the end, or from a preemption, after which SLURM requeues by itself. Lightning requeues
    inside its own signal handler only, which is not used here (`signals.py`).
    """
    warned = level == WARNED if requeue == "auto" else requeue
    if "SLURM_JOB_ID" not in os.environ or not warned:
        return exit_status(level)
    if rank:
        return 0
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    command = ["scontrol", "requeue", job]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(getattr(error, "stderr", "") or error).strip()
        text = f"error: SLURM job {job} was not queued again ({reason}); submit it once more, resume=auto goes on."
        print(text, file=sys.stderr, flush=True)
        return exit_status(level)
    print(f"job {job} is queued again", flush=True)
    return 0
