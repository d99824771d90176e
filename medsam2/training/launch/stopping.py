"""Skip the same bad steps and stop at the same step on all ranks, and choose the exit status.

Steps whose loss or gradient is not finite are skipped, and end the run when they do not stop. That is decided before
the update, once for all ranks, so that no weight or moment ever holds a NaN. It costs one number read back from the
device in each optimiser step; the signals that ranks have received are exchanged with it.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from medsam2.errors import UserError
from medsam2.training.launch.signals import NAMES, NONE, WARNED, exit_status, received_signal

SCONTROL_SECONDS = 60.0  # scontrol waits for the controller


class Stopped(SIGTERMException):
    """Raised where the run stops because of a signal; `last.ckpt` holds its progress.

    Attributes:
        level: `signals.INTERRUPT`, `TERMINATE` or `WARNED`, the same on all ranks.
    """

    def __init__(self, level: int) -> None:
        super().__init__(f"{NAMES[level]}; the run goes on with resume=auto")
        self.level = level


class Stopping(Callback):
    """The stop that all ranks have agreed on. `Guard` exchanges it in each optimiser step with the fault.

    This callback asks for a stop between steps: before the first one, and after each case of a validation. Nothing has
    to be saved there, since `last.ckpt` is written before a validation begins.
    """

    def __init__(self) -> None:
        self.level = NONE

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._ask(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._ask(trainer)

    def _ask(self, trainer: L.Trainer) -> None:
        self.agree(int(largest(trainer, [received_signal()])[0]))
        self.stop()

    def agree(self, level: int) -> None:
        """Record the level on which all ranks agree."""
        self.level = max(self.level, level)

    def stop(self) -> None:
        """Raise if the ranks have agreed to stop.

        Raises:
            Stopped: on all ranks.
        """
        if self.level != NONE:
            raise Stopped(self.level)


def largest(trainer: L.Trainer, numbers: list[float]) -> list[float]:
    """Return the maximum of each number over all ranks, by one reduction."""
    if trainer.world_size == 1:
        return numbers
    sent = torch.tensor(numbers, dtype=torch.float32, device=trainer.strategy.root_device)
    reduced: list[float] = trainer.strategy.reduce(sent, reduce_op="max").tolist()
    return reduced


# ----------------------------------------------------------------------------------------------------- bad steps


class Fault(IntEnum):
    """What is wrong with a step, seen from one rank. A reduced gradient does not say which rank spoiled it."""

    NONE = 0
    REDUCED_GRADIENT = 1
    LOCAL_LOSS = 2


class Guard(Callback):
    """Skips, counts (`train/skipped`, `train/grad_norm` in the log) and stops.

    Args:
        max_bad_steps: number of skipped steps in a row that ends the run.
        stopping: receives the signals of all ranks, which are exchanged together with the fault.
    """

    def __init__(self, max_bad_steps: int, stopping: Stopping) -> None:
        self.max_bad_steps, self.stopping = max_bad_steps, stopping
        self.skipped = self.in_a_row = 0
        self.loss: Tensor | None = None  # sum over the accumulated batches, on the device

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = int(state_dict["skipped"]), int(state_dict["in_a_row"])

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        loss = loss.detach().float()
        self.loss = loss if self.loss is None else self.loss + loss

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """After the gradients are there (reduced over ranks, unscaled) and before they are clipped and used.

        Raises:
            UserError: on all ranks, where this was the last of `max_bad_steps` bad steps in a row.
        """
        norm = gradient_norm(module.parameters())
        module.log("train/grad_norm", norm, batch_size=1)
        assert self.loss is not None
        loss, size = torch.stack([self.loss.reshape(()), norm.float().to(self.loss.device)]).tolist()
        self.loss = None
        fault = Fault.NONE
        if not math.isfinite(loss):
            fault = Fault.LOCAL_LOSS
        elif not math.isfinite(size):
            fault = Fault.REDUCED_GRADIENT
        worst, level = largest(trainer, [float(fault), received_signal()])
        self.stopping.agree(int(level))
        if worst == Fault.NONE:
            self.in_a_row = 0
        elif not (worst == Fault.REDUCED_GRADIENT and self._is_left_to_the_scaler(trainer)):
            reason = f"loss {loss}" if not math.isfinite(loss) else f"gradient of norm {size}"
            self._skip(trainer, module, reason if fault == worst else "")
        if self.skipped:
            module.log("train/skipped", float(self.skipped), batch_size=1)

    @staticmethod
    def _is_left_to_the_scaler(trainer: L.Trainer) -> bool:
        """Whether the fp16 scaler skips the step itself: it finds its scale by gradients that overflow."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return scaler is not None and float(scaler.get_scale()) > 1

    def _skip(self, trainer: L.Trainer, module: L.LightningModule, reason: str) -> None:
        """Drop the gradients: without them the optimiser changes no weight and no moment."""
        for parameter in module.parameters():
            parameter.grad = None
        self.skipped += 1
        self.in_a_row += 1
        step = trainer.global_step
        if reason:
            print(f"step {step} is skipped on all ranks: {reason} on rank {trainer.global_rank}", flush=True)
        if self.in_a_row >= self.max_bad_steps:
            raise UserError(
                f"{self.in_a_row} steps in a row, the last one step {step}, had a loss or gradient that is not finite "
                f"(trainer.max_bad_steps={self.max_bad_steps}); all were skipped. docs/how-to/train.md says how to "
                "look at their clips. Go on with trainer.precision=32-true, or start again with a lower optim.lr or "
                "optim.clip."
            )


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """2-norm of all gradients together (0 where there is none), on their device, not read back."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())


# -------------------------------------------------------------------------------------------------------- SLURM


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
