"""Steps whose loss or gradient is not finite are skipped, and end the run when they do not stop.

The decision is made before the update, once for all ranks, so that no weight or moment ever holds a NaN. It costs one
number read back from the device in each optimiser step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import IntEnum
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from medsam2.errors import UserError
from medsam2.training.signals import heard
from medsam2.training.stopping import Stopping, largest


class Fault(IntEnum):
    """What is wrong with a step, seen from one rank. A reduced gradient does not say which rank spoiled it."""

    NONE = 0
    REDUCED_GRADIENT = 1
    LOCAL_LOSS = 2


class Guard(Callback):
    """Skips, counts (`train/skipped`, `train/grad_norm` in the log) and stops.

    Args:
        max_bad_steps: so many skipped steps in a row end the run.
        stopping: is told which signals the ranks have heard, which travel with the number that they exchange anyway.
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

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
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
        worst, level = largest(trainer, [float(fault), heard()])
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
        """Float16: a gradient that overflows is how the scaler finds its scale; it skips the step itself."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return scaler is not None and float(scaler.get_scale()) > 1

    def _skip(self, trainer: L.Trainer, module: L.LightningModule, reason: str) -> None:
        """Without gradients the optimiser changes nothing: no weight, no decay, no moment."""
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
                f"(trainer.max_bad_steps={self.max_bad_steps}); all were skipped. docs/training.md says how to look at "
                "their clips. Go on with trainer.precision=32-true, or start again with a lower optim.lr or optim.clip."
            )


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """2-norm of all gradients together (0 where there is none), on their device, not read back."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
