"""The LightningModule: encode, plan prompts, track, loss.

Legend: B clips, T frames, N objects, S input side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from medsam2.data.augment import AugmentedBatch
from medsam2.errors import UserError
from medsam2.evaluation.quick import LoadedCase, score_cases
from medsam2.model.build import LoadedModel
from medsam2.model.losses import Losses, clip_loss
from medsam2.model.rollout import count_correct_presence, rollout
from medsam2.model.tracker import TrackedFrame, Tracker
from medsam2.prompts.randomness import Draws
from medsam2.prompts.simulate import PromptPlan, plan_prompts
from medsam2.training.optim import make_optimizer
from medsam2.training.settings import TrainSettings


class FineTuner(L.LightningModule):
    """Fine-tunes SAM 2 through simulated prompts.

    Args:
        loaded: the network to start from.
        settings: the run's configuration.
        content_hashes: of the training cases; they travel with every checkpoint so that evaluation can tell a leak.
        datasets: source and licence by data set; they travel with it too, beside those of the weights it starts from.
    """

    needs_data = True

    def __init__(
        self,
        loaded: LoadedModel,
        settings: TrainSettings,
        content_hashes: tuple[str, ...] = (),
        datasets: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.spec = loaded.spec
        self.tracker = Tracker(loaded.sam).train()  # Lightning keeps the mode in which it finds a module
        self.provenance = {
            "spec": loaded.spec.to_dict(),
            "start": loaded.source,
            "seed": settings.seed,
            "content_hashes": sorted({*content_hashes, *loaded.metadata.get("content_hashes", ())}),
            "datasets": with_earlier(datasets or {}, loaded.metadata.get("datasets", {})),
        }
        self.scores: dict[str, MeanMetric] = {}

    # ------------------------------------------------------------------------------------------------ training

    def training_step(self, batch: AugmentedBatch, batch_idx: int) -> Tensor:
        plan = self.plan(batch.step, batch.frames.shape[1])
        tracked = self.track(batch, plan)
        losses = clip_loss(tracked, batch.masks, self.settings.loss, self.objects_per_rank(batch.masks))
        self.log_step(losses, plan, count_correct_presence(tracked, batch.masks))
        return losses.total

    def plan(self, step: int, num_frames: int) -> PromptPlan:
        """What the whole batch of this step shares, the same on all ranks."""
        return plan_prompts(self.settings.prompts, Draws(self.settings.seed, step), num_frames)

    def track(self, batch: AugmentedBatch, plan: PromptPlan) -> list[TrackedFrame]:
        """Encode all frames once, then roll the objects out through their clips."""
        features = self.tracker.encode(batch.frames.flatten(0, 1))
        return rollout(
            self.tracker, features, batch.masks, batch.object_to_clip, batch.object_seeds, plan, self.settings.prompts
        )

    def objects_per_rank(self, masks: Tensor) -> Tensor:
        """Objects of this step, averaged over ranks: DDP's mean of gradients is then that of one large batch."""
        count = torch.tensor(float(masks.shape[0]), device=masks.device)
        if self.trainer.world_size > 1:
            count = self.all_gather(count).float().mean()  # type: ignore[union-attr]
        return count

    def log_step(self, losses: Losses, plan: PromptPlan, presence: Tensor) -> None:
        report = {f"train/{name}": value.detach() for name, value in losses.report().items()}
        report[f"train/loss_{plan.kind}"] = losses.total.detach()
        report["train/presence_accuracy"] = presence
        self.log_dict(report, batch_size=1)
        self.log("loss", losses.total.detach(), prog_bar=True, logger=False, batch_size=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer, schedule = make_optimizer(self.tracker.sam, self.settings.optim, self.settings.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self.scores = {}

    def validation_step(self, case: LoadedCase, batch_idx: int) -> None:
        for protocol in self.settings.validation.protocols:
            for row in score_cases(self.tracker, [case], protocol):
                name = protocol.name
                for key in ("val/dsc", f"val/{name}/dsc", f"val/{name}/{row.dataset}/dsc", f"val/{row.structure}/dsc"):
                    self._score(key, row.dsc)

    def _score(self, key: str, value: float) -> None:
        metric = self.scores.setdefault(key, MeanMetric().to(self.device))
        metric.update(value)

    def on_validation_epoch_end(self) -> None:
        values = {key: metric.compute() for key, metric in self.scores.items()}
        self.log_dict({k: v for k, v in values.items() if k != "val/dsc"})
        self.log("val/dsc", values.get("val/dsc", torch.tensor(0.0)), prog_bar=True)

    # ---------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Only primitives and tensors, so that every consumer loads the file with `weights_only=True`."""
        checkpoint["medsam2"] = {**self.provenance, "step": int(self.trainer.global_step)}

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        if checkpoint.get("medsam2", {}).get("spec") != self.spec.to_dict():
            found = checkpoint.get("medsam2", {}).get("spec")
            raise UserError(f"the run to resume is of model {found}, this one of {self.spec.to_dict()}.")


def with_earlier(
    datasets: Mapping[str, Mapping[str, str]], earlier: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    """What is stated of the data sets of this run and of earlier ones; an empty field does not replace a stated one."""
    names = sorted({*datasets, *earlier})
    said = {name: {key: text for key, text in datasets.get(name, {}).items() if text} for name in names}
    return {name: {"source": "", "licence": "", **earlier.get(name, {}), **said[name]} for name in names}
