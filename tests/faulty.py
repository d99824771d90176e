"""Training modules with one fault each, for the tests of the guard."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medsam2.data.augment.augment import AugmentedBatch
from medsam2.training.module import FineTuner

BAD_STEP = 2


class Watched(FineTuner):
    """Writes the digest of weights and optimiser at the start of each batch to `states-RANK.jsonl`."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        digest = hashlib.sha256()
        for parameter in self.parameters():
            digest.update(parameter.detach().numpy().tobytes())
            for name, value in sorted(self.trainer.optimizers[0].state.get(parameter, {}).items()):
                digest.update(name.encode() + value.numpy().tobytes())
        row = [self.trainer.global_step, batch_idx, digest.hexdigest(), list(batch.keys)]
        with open(Path(self.settings.output) / f"states-{self.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def faulty_now(self, batch_idx: int) -> bool:
        """At one step: its first batch, on the last rank."""
        last = self.trainer.global_rank == self.trainer.world_size - 1
        return self.trainer.global_step == BAD_STEP and not batch_idx % self.settings.trainer.accumulate and last

    def faulty_loss(self, loss: Tensor) -> Tensor:
        return loss

    def training_step(self, batch: AugmentedBatch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return self.faulty_loss(loss) if self.faulty_now(batch_idx) else loss


class NanLoss(Watched):
    def faulty_loss(self, loss: Tensor) -> Tensor:
        return loss * torch.nan


class InfiniteLoss(Watched):
    def faulty_loss(self, loss: Tensor) -> Tensor:
        return loss + torch.inf


class NanGradient(Watched):
    """The loss is finite, and one number of the gradient of one parameter is not."""

    def faulty_loss(self, loss: Tensor) -> Tensor:
        weight = next(p for p in self.parameters() if p.requires_grad)
        spoilt: Tensor = _Spoil.apply(weight)
        return loss + spoilt.sum()


class LossThenGradient(NanGradient):
    """On the last rank: at the bad step the loss, at the next the gradient."""

    def faulty_now(self, batch_idx: int) -> bool:
        last = self.trainer.global_rank == self.trainer.world_size - 1
        return last and self.trainer.global_step in (BAD_STEP, BAD_STEP + 1)

    def faulty_loss(self, loss: Tensor) -> Tensor:
        return loss * torch.nan if self.trainer.global_step == BAD_STEP else super().faulty_loss(loss)


class _Spoil(torch.autograd.Function):
    """Zero forward, NaN backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        spoilt = torch.zeros_like(gradient)
        spoilt.flatten()[0] = torch.nan
        return spoilt


class BrokenWeight(Watched):
    """From one step on a layer of the mask decoder gives infinite numbers: every loss is NaN."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == BAD_STEP:
            layer = self.tracker.sam.sam_mask_decoder.transformer.layers[1].mlp.layers[0]
            assert isinstance(layer, nn.Linear)
            with torch.no_grad():
                layer.bias[3] = torch.inf
        super().on_train_batch_start(batch, batch_idx)


class Exhausted(Watched):
    """The device has no memory left at one step."""

    def faulty_loss(self, loss: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")


class ExhaustedMachine(Watched):
    """The machine has no memory left: torch asks for more than there is."""

    def faulty_loss(self, loss: Tensor) -> Tensor:
        return loss + torch.empty(2**60).sum()
