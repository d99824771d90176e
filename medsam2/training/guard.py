"""Steps whose loss or gradient is not finite are left out, kept for replay, and end the run when they do not stop.

The decision is made before the update, once for all ranks, so that no weight, moment or average ever holds a NaN.
It costs one number read back from the device in each optimiser step.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from medsam2.data.augment import AugmentedBatch
from medsam2.errors import UserError
from medsam2.files import atomic_write
from medsam2.prompts.randomness import Draws
from medsam2.training.settings import TrainSettings
from medsam2.training.signals import heard
from medsam2.training.stopping import Stopping, largest

if TYPE_CHECKING:
    from medsam2.training.module import FineTuner

FOLDER = "bad"
TENSORS = ("frames", "masks", "object_to_clip", "object_seeds", "seeds")
FINE, SHARED, OWN = 0.0, 1.0, 2.0  # how far a step is this rank's fault: not, by a gradient that all share, by itself


@dataclasses.dataclass(frozen=True)
class Culprit:
    """A batch whose loss or gradient is not finite.

    Attributes:
        micro: its number among the batches that are accumulated for one step.
        loss, norm: the loss, and the norm of all gradients after it (loss scaling taken out where there is one).
    """

    batch: Any
    micro: int
    loss: float
    norm: float

    @property
    def reason(self) -> str:
        return f"loss {self.loss}" if not math.isfinite(self.loss) else f"gradient of norm {self.norm}"


class Guard(Callback):
    """Skips, dumps, counts (`train/skipped`, `train/grad_norm` in the log) and stops.

    Args:
        settings: the run's. folder: the run folder; dumps go to `bad/` in it.
        stopping: is told what signals the ranks have heard, which travels with the number that they exchange anyway.
    """

    def __init__(self, settings: TrainSettings, folder: Path, stopping: Stopping) -> None:
        self.settings, self.folder, self.stopping = settings, folder, stopping
        self.skipped = self.in_a_row = self.dumped = 0
        self.batch: Any = None
        self.micro = 0
        self.loss: Tensor | None = None
        self.culprit: Culprit | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "dumped": self.dumped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row, self.dumped = (int(state_dict[n]) for n in ("skipped", "in_a_row", "dumped"))

    # ------------------------------------------------------------------------------------- the course of a step

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        self.batch, self.micro = batch, index % trainer.accumulate_grad_batches

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        self.loss = loss.detach()

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Of several accumulated batches the first bad one is told from the others before the next is added to it."""
        if self.culprit is None and self.micro + 1 < trainer.accumulate_grad_batches:
            self.culprit = self._look(trainer, gradient_norm(module.parameters()))

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """After the gradients are there (reduced over ranks, unscaled) and before they are clipped and used.

        Raises:
            UserError: on all ranks, where this was the last of `trainer.max_bad_steps` bad steps in a row.
        """
        norm = gradient_norm(module.parameters())
        module.log("train/grad_norm", norm, batch_size=1)
        found, self.culprit = self.culprit or self._look(trainer, norm), None
        self.batch = None
        own = FINE if found is None else self._fault(trainer, found)
        worst, level = largest(trainer, [own, heard()])
        self.stopping.agree(int(level))
        if worst == FINE:
            self.in_a_row = 0
        elif not self._scaler_deals_with_it(trainer, found):
            self._skip(trainer, module, found if own == worst else None)
        if self.skipped:
            module.log("train/skipped", float(self.skipped), batch_size=1)

    # -------------------------------------------------------------------------------------------------- finding

    def _look(self, trainer: L.Trainer, norm: Tensor) -> Culprit | None:
        assert self.loss is not None
        loss, size = torch.stack([self.loss.float().reshape(()), norm.float().to(self.loss.device)]).tolist()
        accumulated, scaler = trainer.accumulate_grad_batches, getattr(trainer.precision_plugin, "scaler", None)
        loss *= accumulated  # Lightning has divided it
        if scaler is not None:
            loss /= float(scaler.get_scale())
        if math.isfinite(loss) and math.isfinite(size):
            return None
        return Culprit(self.batch, self.micro, loss, size)

    @staticmethod
    def _fault(trainer: L.Trainer, found: Culprit) -> float:
        """With several ranks the reduced gradient says that some rank is to blame, only the loss says which."""
        early = found.micro + 1 < trainer.accumulate_grad_batches  # not reduced yet
        alone = trainer.world_size == 1 or early or not math.isfinite(found.loss)
        return OWN if alone else SHARED

    @staticmethod
    def _scaler_deals_with_it(trainer: L.Trainer, found: Culprit | None) -> bool:
        """Float16: a gradient that overflows is how the scaler finds its scale; it skips the step itself."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        overflow = found is None or math.isfinite(found.loss)
        return scaler is not None and overflow and float(scaler.get_scale()) > 1

    # ------------------------------------------------------------------------------------------------- skipping

    def _skip(self, trainer: L.Trainer, module: L.LightningModule, mine: Culprit | None) -> None:
        """Without gradients the optimiser changes nothing: no weight, no decay, no moment."""
        for parameter in module.parameters():
            parameter.grad = None
        self.skipped += 1
        self.in_a_row += 1
        step = trainer.global_step
        if self.dumped < self.settings.trainer.bad_dumps:
            self.dumped += 1
            self._dump(trainer, module, step, mine)
        if mine is not None:
            print(f"step {step} is skipped on all ranks: {mine.reason} on rank {trainer.global_rank}", flush=True)
        if self.in_a_row >= self.settings.trainer.max_bad_steps:
            raise UserError(
                f"{self.in_a_row} steps in a row, the last one step {step}, had a loss or gradient that is not finite "
                f"(trainer.max_bad_steps={self.settings.trainer.max_bad_steps}); all were skipped, and the last "
                f"checkpoint is finite. Look at {self.folder / FOLDER} with medsam2.training.replay, then go on with "
                "trainer.precision=32-true, a lower optim.lr or a lower optim.clip."
            )

    def _dump(self, trainer: L.Trainer, module: L.LightningModule, step: int, mine: Culprit | None) -> None:
        folder = self.folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        if mine is not None and isinstance(mine.batch, AugmentedBatch):
            name = f"step-{step:06d}-rank-{trainer.global_rank}.safetensors"
            write_batch(folder / name, module, mine, step, trainer.global_rank)  # type: ignore[arg-type]
        self._dump_weights(folder / weights_name(step), module)

    @rank_zero_only
    def _dump_weights(self, path: Path, module: L.LightningModule) -> None:
        """The weights that met the batch: those of the last checkpoint are of an earlier step."""
        from safetensors.torch import save

        state = module.tracker.sam.state_dict()  # type: ignore[union-attr]
        with atomic_write(path) as file:
            file.write(save({name: value.detach().cpu().contiguous().clone() for name, value in state.items()}))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """2-norm of all gradients together (0 where there is none), on their device, not read back."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())


# ---------------------------------------------------------------------------------------------------- the dump


def weights_name(step: int) -> str:
    return f"step-{step:06d}-weights.safetensors"


def write_batch(path: Path, module: FineTuner, culprit: Culprit, step: int, rank: int) -> None:
    """The batch as it reached the step, and in the header what identifies it."""
    from safetensors.torch import save

    batch: AugmentedBatch = culprit.batch
    plan = module.plan(draws_of(module.settings, batch), batch)
    said = {
        "step": step, "rank": rank, "micro": culprit.micro, "seed": module.settings.seed, "reason": culprit.reason,
        "loss": culprit.loss, "gradient_norm": culprit.norm, "batch_step": batch.step,
        "prompt_frame": batch.prompt_frame, "keys": batch.keys, "datasets": batch.datasets, "names": batch.names,
        "modalities": batch.modalities, "precision": module.settings.trainer.precision,
        "plan": dataclasses.asdict(plan),
    }  # fmt: skip
    tensors = {name: getattr(batch, name).detach().cpu().contiguous().clone() for name in TENSORS}
    with atomic_write(path) as file:
        file.write(save(tensors, metadata={"medsam2": json.dumps(said, default=str)}))


def draws_of(settings: TrainSettings, batch: AugmentedBatch) -> Draws:
    """The random numbers that the whole batch shares, as in `FineTuner.training_step`."""
    return Draws(settings.seed, batch.step)
