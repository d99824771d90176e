"""The fit loop that makes up for a validation which an interruption has cut off."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
from lightning.pytorch.loops.fit_loop import _FitLoop


class GoOnLoop(_FitLoop):
    """Lightning's loop, which would not repeat the validation between whose begin and end a run was interrupted.

    Such a run has saved its step, but not the scores of it: without them `metrics.csv` lacks a row, and the best
    checkpoint may be chosen differently. A run that was interrupted in its last validation has all its steps, and
    still gets what belongs to the end of training.

    Args:
        owes: whether the validation of the current step has not been finished.
    """

    def __init__(self, trainer: L.Trainer, owes: Callable[[], bool]) -> None:
        before = trainer.fit_loop
        super().__init__(trainer, min_epochs=before.min_epochs, max_epochs=before.max_epochs)
        self.epoch_loop = before.epoch_loop
        self.owes = owes

    @property
    def skip(self) -> bool:
        """Whether there is nothing left to do."""
        return super().skip and not self.owes()

    def on_run_start(self) -> None:
        super().on_run_start()
        if self.owes():
            self._validate()

    def _validate(self) -> None:
        """As the epoch loop does between two steps, so that the scores are logged at the step that they belong to."""
        trainer, connector, loop = self.trainer, self.trainer._logger_connector, self.epoch_loop.val_loop
        first = connector._first_loop_iter
        loop.restarting = False
        trainer.validating = True
        loop.run()
        trainer.training = True
        connector._first_loop_iter = first
