"""All ranks stop at the same step when a signal has reached one of them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from medsam2.training.signals import NAMES, NONE, heard


class Stopped(SIGTERMException):
    """The run ends here because of a signal; what it has done is in `last.ckpt`.

    Attributes:
        level: what was heard (signals.TERMINATE or WARNED), the same on all ranks.
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
    found: list[float] = trainer.strategy.reduce(sent, reduce_op="max").tolist()
    return found
