"""The fit loop that makes up for a validation which an interruption has cut off."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
from lightning.pytorch.loops.fit_loop import _FitLoop


class ResumeValidationLoop(_FitLoop):
    """Runs the validation that an interruption cut off, before training continues.

    Such a run has saved its step, but not the scores of it: without them `metrics.csv` lacks a row, and the best
    checkpoint may be chosen differently. A run that was interrupted in its last validation has all its steps, and
    still gets what belongs to the end of training. Lightning has no public hook between loading a checkpoint and
    deciding that nothing is left to do, so that its private loop is extended.

    Args:
        validation_pending: whether the validation of the current step has not been finished.
    """

    def __init__(self, trainer: L.Trainer, validation_pending: Callable[[], bool]) -> None:
        lightning_loop = trainer.fit_loop
        super().__init__(trainer, min_epochs=lightning_loop.min_epochs, max_epochs=lightning_loop.max_epochs)
        self.epoch_loop = lightning_loop.epoch_loop
        self.validation_pending = validation_pending

    @property
    def skip(self) -> bool:
        """Whether there is nothing left to do."""
        return super().skip and not self.validation_pending()

    def on_run_start(self) -> None:
        super().on_run_start()
        if self.validation_pending():
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
