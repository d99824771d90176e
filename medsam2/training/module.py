"""The LightningModule: encode, plan prompts, track, loss.

Legend: B clips, T frames, N objects, S input side.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from medsam2.adaptation.adapter import adapter_provenance
from medsam2.adaptation.anchors import Anchors
from medsam2.data.augment.augment import AugmentedBatch
from medsam2.data.plan.randomness import seed63
from medsam2.errors import UserError
from medsam2.fast.execution import apply_speed
from medsam2.model.build import LoadedModel
from medsam2.model.losses import Losses, clip_loss
from medsam2.model.policies import make_policy
from medsam2.model.provenance import Provenance, read_provenance
from medsam2.model.rollout import count_correct_presence, rollout
from medsam2.model.tracker import TrackedFrame, Tracker
from medsam2.prompts.randomness import Draws, RandomStream
from medsam2.prompts.simulate import PromptPlan, plan_prompts
from medsam2.training.callbacks.validation import (
    ScoreRow,
    ValidationCase,
    gather_rows,
    mean_obedience,
    mean_over_ranks,
    mean_scores,
    probe,
    start_scores,
    with_tradeoff,
)
from medsam2.training.optim import make_optimizer
from medsam2.training.retention import distillation_loss, distilled_objects, pull_after_steps
from medsam2.training.run_folder.resume import recipe, refuse_other_recipe, resumed_provenance
from medsam2.training.settings import TrainSettings


class FineTuner(L.LightningModule):
    """Fine-tunes SAM 2 through simulated prompts.

    Args:
        loaded: the network to start from.
        settings: the run's configuration.
        content_hashes: of the training cases; every checkpoint records them so that evaluation can detect a leak.
        datasets: source and licence by dataset, recorded beside those of the weights it starts from.
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
        policy = make_policy(settings.memory, loaded.sam)
        self.tracker = Tracker(loaded.sam, policy).train()  # Lightning keeps the mode in which it finds a module
        apply_speed(self.tracker, settings.model)
        self.provenance = Provenance(
            spec=loaded.spec,
            start=loaded.source,
            seed=settings.seed,
            content_hashes=tuple(sorted({*content_hashes, *loaded.provenance.content_hashes})),
            datasets=merge_datasets(datasets or {}, loaded.provenance.datasets),
            recipe=recipe(settings),
            adapter=adapter_provenance(loaded.sam, settings.adaptation, loaded.source),
        )
        self.anchors = Anchors(loaded.sam) if settings.retention.needs_start else None
        self.start_scores: dict[str, float] = {}
        self.scores: list[ScoreRow] = []
        self.obedience: list[bool] = []
        self.clip_losses: list[float] = []
        self.batch_ended = 0.0
        # Losses on their device by kind of prompt since the last logged step; `log.LossByKind` empties it.
        self.kind_losses: dict[str, list[Tensor]] = {}

    # ------------------------------------------------------------------------------------------------ training

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout (in the memory attention of models above nano) uses torch's global generators, whose state is not
        # checkpointed per rank. Reseeding each step makes a resumed run draw the same masks.
        accumulated = batch_idx % self.settings.trainer.accumulate
        step, rank = self.trainer.global_step, self.trainer.global_rank
        torch.manual_seed(seed63(self.settings.seed, RandomStream.DROPOUT, step, accumulated, rank))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batch_ended = time.monotonic()  # after all callbacks: saving a checkpoint is not waiting for data

    def training_step(self, batch: AugmentedBatch, batch_idx: int) -> Tensor:
        plan = self.plan(Draws(self.settings.seed, batch.step), batch)
        objects = self.objects_per_rank(batch.masks)
        teacher = self.starting_masks(batch, plan)
        tracked = self.track(batch, plan)
        losses = clip_loss(tracked, batch.masks, self.settings.loss, objects)
        self.log_step(losses, plan, count_correct_presence(tracked, batch.masks))
        return losses.total if teacher is None else losses.total + self.distance(tracked, teacher, batch, objects)

    def plan(self, draws: Draws, batch: AugmentedBatch) -> PromptPlan:
        """Draw the prompt plan that the whole batch shares, the same on all ranks."""
        return plan_prompts(self.settings.prompts, draws, batch.frames.shape[1], first=batch.prompt_frame)

    def track(self, batch: AugmentedBatch, plan: PromptPlan) -> list[TrackedFrame]:
        """Encode all frames once, then roll the objects out through their clips."""
        features = self.tracker.encode(batch.frames.flatten(0, 1))
        return rollout(
            self.tracker, features, batch.masks, batch.object_to_clip, batch.object_seeds, plan, self.settings.prompts
        )

    def starting_masks(self, batch: AugmentedBatch, plan: PromptPlan) -> list[TrackedFrame] | None:
        """Track with the starting model under the same prompts and correction rules; None without distillation."""
        if not self.settings.retention.distillation or self.anchors is None:
            return None
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices), torch.no_grad(), self.anchors.at_start(self.tracker.sam):
            return self.track(batch, plan)

    def distance(
        self, tracked: list[TrackedFrame], teacher: list[TrackedFrame], batch: AugmentedBatch, objects: Tensor
    ) -> Tensor:
        """The weighted distillation loss, logged."""
        retention = self.settings.retention
        old = self.trainer.datamodule.old_datasets if retention.distil_on == "old" else None  # type: ignore[attr-defined]
        included = distilled_objects(batch.object_to_clip, batch.datasets, old)
        loss = distillation_loss(tracked, teacher, self.settings.loss, included, objects)
        self.log_dict(mean_over_ranks({"train/distillation": loss.detach()}), batch_size=1)
        return retention.distillation * loss

    def objects_per_rank(self, masks: Tensor) -> Tensor:
        """Objects of this step, averaged over ranks: DDP's mean of gradients is then that of one large batch."""
        count = torch.tensor(float(masks.shape[0]), device=masks.device)
        return mean_over_ranks({"objects": count})["objects"]

    def log_step(self, losses: Losses, plan: PromptPlan, presence: Tensor) -> None:
        report = {f"train/{name}": value.detach() for name, value in losses.report().items()}
        report["train/presence_accuracy"] = presence
        report = mean_over_ranks(report)
        self.log_dict(report, batch_size=1)
        self.kind_losses.setdefault(plan.kind, []).append(report["train/loss"])
        self.log("loss", report["train/loss"], prog_bar=True, logger=False, batch_size=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        fused = self.settings.trainer.precision != "16-mixed"
        optimizer, schedule = make_optimizer(self.tracker.sam, self.settings.optim, self.settings.schedule_steps, fused)
        if self.settings.retention.l2 and self.anchors is not None:
            pull_after_steps(optimizer, self.tracker.sam, self.anchors, self.settings.retention.l2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # as Lightning does, which refuses a fused optimiser under any mixed precision for the sake of fp16's scaler
        if gradient_clip_val:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            torch.nn.utils.clip_grad_norm_(weights, gradient_clip_val)

    # ---------------------------------------------------------------------------------------------- validation

    def on_fit_start(self) -> None:
        if self.anchors is not None:
            self.anchors.to(self.device)

    def on_train_start(self) -> None:
        """The starting model's scores, beside which every validation puts ours."""
        if self.settings.validation.cases and self.needs_data:
            self.start_scores = start_scores(self.trainer, self.settings, self.tracker)

    def on_validation_epoch_start(self) -> None:
        self.scores, self.obedience, self.clip_losses = [], [], []

    def validation_step(
        self, batch: ValidationCase | AugmentedBatch | None, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Scores a whole case, or takes the loss of one fixed clip; None where another rank has more of them."""
        if isinstance(batch, ValidationCase):
            scores, obedience = probe(self.tracker, batch, self.settings.validation.protocols)
            self.scores += scores
            self.obedience += obedience
        elif batch is not None:
            self.clip_losses.append(float(self.fixed_loss(batch).total))

    def fixed_loss(self, batch: AugmentedBatch) -> Losses:
        """The loss of one clip under prompts that follow from the clip alone, whatever the step, seed and rank."""
        plan = self.plan(Draws(0, int(batch.seeds[0])), batch)
        objects = torch.tensor(float(batch.num_objects), device=batch.masks.device)
        return clip_loss(self.track(batch, plan), batch.masks, self.settings.loss, objects)

    def on_validation_epoch_end(self) -> None:
        """Every rank logs the same means, so that all agree on the best checkpoint."""
        self.scores = gather_rows(self.scores)
        values = {**mean_scores(self.scores), **mean_obedience(gather_rows(self.obedience))}
        clips = gather_rows(self.clip_losses)
        if clips:
            self.log("val/loss", fmean(clips), batch_size=1)
        dsc = values.pop("val/dsc", 0.0)
        if self.settings.validation.cases:
            values = with_tradeoff(values, self.start_scores, self.settings.validation)
        self.log_dict(values, batch_size=1)
        if self.settings.validation.cases:
            self.log("val/dsc", dsc, prog_bar=True, batch_size=1)

    # ---------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Only primitives and tensors, so that every consumer loads the file with `weights_only=True`."""
        checkpoint["medsam2"] = self.provenance.model_copy(update={"step": int(self.trainer.global_step)}).to_dict()

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        spec = read_provenance(checkpoint.get("medsam2"), "the checkpoint to resume").spec
        if spec != self.spec:
            raise UserError(f"the run to resume is of model {spec}, this one of {self.spec}.")
        refuse_other_recipe(checkpoint, self.settings)
        self.provenance = resumed_provenance(self.provenance, checkpoint)


def merge_datasets(
    datasets: Mapping[str, Mapping[str, str]], earlier: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    """Merge source and licence of this run's datasets with earlier ones; an empty field replaces nothing."""
    names = sorted({*datasets, *earlier})
    stated = {name: {key: text for key, text in datasets.get(name, {}).items() if text} for name in names}
    return {name: {"source": "", "licence": "", **earlier.get(name, {}), **stated[name]} for name in names}
