"""Training modules that get a signal, or are killed, at a stated place of a step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medsam2.data.augment.augment import AugmentedBatch
from medsam2.model.build import LoadedModel
from medsam2.training.module import FineTuner
from medsam2.training.settings import TrainSettings

TIMES = 2  # that a signal is sent, as schedulers do
STEP = 1  # global_step when it comes: in the second step
PLACE = "MEDSAM2_TEST_PLACE"  # of the signal
SIGNAL = "MEDSAM2_TEST_SIGNAL"


def send(place: str) -> None:
    """The signal that the environment asks for, where this is the place; once."""
    if os.environ.get(PLACE) == place:
        os.environ[PLACE] = ""
        for _ in range(TIMES):
            os.kill(os.getpid(), int(os.environ[SIGNAL]))


class Signalled(FineTuner):
    """Sends itself a signal `TIMES` times at `PLACE`."""

    def __init__(self, loaded: LoadedModel, settings: TrainSettings, *more: Any) -> None:
        super().__init__(loaded, settings, *more)
        send("construction")

    def in_step(self, place: str) -> None:
        if self.trainer.global_step == STEP:
            send(place)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        send("fit_start")

    def on_train_start(self) -> None:
        super().on_train_start()
        send("train_start")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.in_step("batch_start")

    def training_step(self, batch: AugmentedBatch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.in_step("forward")
        return loss

    def on_after_backward(self) -> None:
        self.in_step("backward")

    def optimizer_step(self, *arguments: Any, **more: Any) -> None:
        super().optimizer_step(*arguments, **more)
        self.in_step("update")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        send("save")

    def validation_step(self, *arguments: Any, **more: Any) -> None:
        super().validation_step(*arguments, **more)
        send("validation")

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        send("validation_end")


class OneRank(FineTuner):
    """The last rank alone gets SIGTERM, in its second step."""

    def training_step(self, batch: AugmentedBatch, batch_idx: int) -> Tensor:
        last = self.trainer.global_rank == self.trainer.world_size - 1
        if self.trainer.global_step == STEP and last:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


class Killed(Signalled):
    """Is killed at the places that `kills.txt` in the run folder lists, one a line, each once."""

    def at(self, place: str) -> None:
        path = Path(self.settings.output).with_suffix(".kills")
        places = path.read_text().split() if path.exists() else []
        if places[:1] == [f"{place}:{self.trainer.global_step}"]:
            path.write_text("\n".join(places[1:]))
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.at("batch")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.at("save")

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.at("saved")  # checkpoint callbacks come before the module

    def validation_step(self, *arguments: Any, **more: Any) -> None:
        super().validation_step(*arguments, **more)
        self.at("validation")


class DyingRank(FineTuner):
    """A rank is killed at its second step, or stays where it is; `MEDSAM2_TEST_DIES` names it."""

    def training_step(self, batch: AugmentedBatch, batch_idx: int) -> Tensor:
        if self.trainer.global_step == STEP:
            if str(self.trainer.global_rank) == os.environ["MEDSAM2_TEST_DIES"]:
                os.kill(os.getpid(), signal.SIGKILL)
            if os.environ.get("MEDSAM2_TEST_HANGS"):
                time.sleep(600)  # as in a collective of NCCL
        return super().training_step(batch, batch_idx)


class LateRank(FineTuner):
    """Rank 1 does not come to the second step."""

    def training_step(self, batch: AugmentedBatch, batch_idx: int) -> Tensor:
        if self.trainer.global_step == STEP and self.trainer.global_rank == 1:
            time.sleep(600)
        return super().training_step(batch, batch_idx)


def forked(work: Callable[[], object]) -> int:
    """The status of `work` in a process of its own that need not load torch again; negative for a signal."""
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
