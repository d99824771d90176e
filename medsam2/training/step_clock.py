"""Optimiser steps are the clock of a run, also where Lightning counts batches and epochs."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from medsam2.errors import UserError


class StepClock(pl.Callback):
    """Lets a resumed run go on at exactly the optimiser step of its checkpoint.

    Lightning resumes from its own counts of batches, which are those of the run that wrote the checkpoint: with
    another accumulation (2 ranks before, 1 rank with two accumulated batches now) they would put the optimiser step
    in the middle of a batch, and a checkpoint from the end of an epoch would start with half a batch. Here they are
    computed from the step. `ClipDataModule` gives the whole run as one epoch, so that there is no other boundary.
    """

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loop = checkpoint.get("loops", {}).get("fit_loop")
        if loop is None:  # weights alone
            return
        step = int(checkpoint["global_step"])
        batches = step * int(trainer.accumulate_grad_batches)
        # As at the end of a batch, where checkpoints are written: Lightning completes it, and counts its step, itself.
        done = {"ready": batches, "started": batches, "processed": batches, "completed": max(batches - 1, 0)}
        loop["epoch_loop.batch_progress"] = {"total": done, "current": dict(done), "is_last_batch": False}
        begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        loop["epoch_progress"] = {"total": begun, "current": dict(begun)}
        loop["epoch_loop.state_dict"] = {"_batches_that_stepped": max(step - 1, 0)}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Every rank must plan from the same index; remote shards may have changed between their starts.

        Raises:
            UserError: on all ranks, where one of them differs.
        """
        data = getattr(trainer, "datamodule", None)
        if trainer.world_size == 1 or data is None:
            return
        own = data.state_dict()
        first = trainer.strategy.broadcast(own, src=0)
        if not trainer.strategy.reduce_boolean_decision(own == first, all=True):
            differing = ", ".join(name for name in first if own.get(name) != first[name]) or "those of another rank"
            raise UserError(
                f"rank {trainer.global_rank} plans other clips than rank 0 ({differing}): the ranks see different "
                "shards or settings. Start them again, all from the same shards."
            )
