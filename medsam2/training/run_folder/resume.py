"""Start or resume a run. There are three ways, which are never mixed:

    start=      a new run whose weights come from a checkpoint: step 0, new optimiser, new schedule, any recipe
    resume=     the same run goes on where it was interrupted: weights, optimiser, schedule, order of clips, exactly
    resume= with a larger trainer.max_steps      the same run made longer

Nothing is ever unpickled: every file is read with `weights_only=True` or as safetensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.utilities import rank_zero_only
from torch.optim.lr_scheduler import LambdaLR

from medsam2.adaptation.freeze import AdaptationSettings
from medsam2.errors import UserError, first_line
from medsam2.model.build import LoadedModel, ModelSpec, build_sam, load_model
from medsam2.model.provenance import Provenance, read_provenance
from medsam2.prompts.settings import PromptSettings
from medsam2.training.optim import rate_at
from medsam2.training.settings import TrainSettings

FIXED = ("adaptation", "optim")  # another one would not fit the checkpoint's optimiser, or be ignored
REMOVED_AUGMENT_KEYS = ("elastic", "min_pixels")  # settings that recipes of earlier checkpoints hold
STATED = ("prompts", "loss", "augment", "retention", "memory")  # may change on the way, but then it is another run


def starting_model(settings: TrainSettings) -> LoadedModel:
    """Random weights of `model`, or those of a checkpoint (whose size must be `model`'s)."""
    spec = ModelSpec(settings.model.name, settings.model.version, settings.model.image_size)
    if settings.start == "random":
        return LoadedModel(build_sam(spec), spec, source="random")
    return load_model(settings.start, spec)


# -------------------------------------------------------------------------------------- what a checkpoint says


def recipe(settings: TrainSettings) -> dict[str, Any]:
    """Return what checkpoints record of the configuration, as plain values; resumed runs are compared by it."""
    whole = settings.model_dump(mode="json", include={*FIXED, *STATED})
    return {**whole, "schedule": {"steps": settings.schedule_steps, "max_steps": settings.trainer.max_steps}}


def peek(path: Path) -> dict[str, Any]:
    """Load a training checkpoint, its tensors memory-mapped.

    Raises:
        UserError: not one of ours, damaged, or with something in it that would have to be unpickled.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a dozen kinds for what a file can be instead
        raise UserError(
            f"resume={path} is not a checkpoint that a run wrote ({first_line(error)}); give a .ckpt of the run, or "
            f"use its weights for a new run by start={path}."
        ) from None
    if not isinstance(content, dict) or "global_step" not in content or "medsam2" not in content:
        raise UserError(
            f"resume={path} holds weights but not the state of a run of medsam2 (optimiser, step); start a new run "
            f"from them by start={path}."
        )
    return content


def recipe_changes(
    checkpoint: Mapping[str, Any], settings: TrainSettings, parts: tuple[str, ...]
) -> list[tuple[str, Any, Any]]:
    """(dotted field, before, now) of what differs between the recipe of a checkpoint and that of this run."""
    before, now = dict(read_provenance(checkpoint.get("medsam2"), "the checkpoint to resume").recipe), recipe(settings)
    if "adaptation" in before:  # checkpoints of version 0.1 have other fields in it
        before["adaptation"] = AdaptationSettings.model_validate(before["adaptation"]).model_dump(mode="json")
    prompts = before.get("prompts")
    if isinstance(prompts, Mapping) and "kinds" not in prompts:  # version 0.1 recorded them side by side
        read = PromptSettings.model_validate(prompts).model_dump(mode="json", exclude_unset=True)
        points = {**now["prompts"]["points"], **read.pop("points", {})}
        before["prompts"] = {**now["prompts"], **read, "points": points}
    augment = before.get("augment")
    if isinstance(augment, Mapping):
        before["augment"] = {name: value for name, value in augment.items() if name not in REMOVED_AUGMENT_KEYS}
    return [row for part in parts for row in differences(part, before.get(part, now[part]), now[part])]


def refuse_other_recipe(checkpoint: Mapping[str, Any], settings: TrainSettings) -> None:
    """A run goes on with the adaptation and the optimiser that it was begun with; other changes are stated.

    Raises:
        UserError: the first field that differs, with both values.
    """
    for field, old, new in recipe_changes(checkpoint, settings, FIXED):
        if (field, old) != ("optim.adapter_layer_decay", False):  # a setting of version 0.1
            raise UserError(
                f"cannot resume: {field} was {old} and is now {new}. Give the old value, or start a new run from the "
                "checkpoint's weights by start=PATH."
            )
    for field, old, new in recipe_changes(checkpoint, settings, STATED):
        warnings.warn(f"{field} was {old} and is now {new}; from here on it is another run.", stacklevel=2)


def resumed_provenance(provenance: Provenance, checkpoint: Mapping[str, Any]) -> Provenance:
    """Return the provenance of a resumed run, whose start is the one that its checkpoint records."""
    before = read_provenance(checkpoint.get("medsam2"), "the checkpoint to resume")
    hashes = tuple(sorted({*provenance.content_hashes, *before.content_hashes}))
    update = {"start": before.start or provenance.start, "adapter": before.adapter or provenance.adapter}
    return provenance.model_copy(update={**update, "content_hashes": hashes})


def differences(field: str, before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """(dotted field, before, now) of every leaf that differs; a section that one of both lacks is one leaf."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = dict.fromkeys((*before, *now))
        return [row for name in names for row in differences(f"{field}.{name}", before.get(name), now.get(name))]
    return [] if before == now else [(field, before, now)]


# ----------------------------------------------------------------------------------------- where a run goes on


class StepClock(Callback):
    """Makes a resumed run continue at exactly the optimiser step of its checkpoint.

    Lightning resumes from its own counts of batches, which are those of the run that wrote the checkpoint: with
    another accumulation (2 ranks before, 1 rank with two accumulated batches now) they would put the optimiser step
    in the middle of a batch, and a checkpoint from the end of an epoch would start with half a batch. Here they are
    computed from the step. `ClipDataModule` gives the whole run as one epoch, so that there is no other boundary.
    """

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
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

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Every rank must plan from the same index; remote shards may have changed between their starts.

        The first step of a run that was made longer has the rate of its new schedule, not the old one's last.

        Raises:
            UserError: on all ranks, where one of them differs.
        """
        put_on_schedule(trainer)
        data = getattr(trainer, "datamodule", None)
        if trainer.world_size == 1 or data is None:
            return
        state = data.state_dict()
        first = trainer.strategy.broadcast(state, src=0)
        if not trainer.strategy.reduce_boolean_decision(state == first, all=True):
            differing = ", ".join(name for name in first if state.get(name) != first[name]) or "those of another rank"
            raise UserError(
                f"rank {trainer.global_rank} plans other clips than rank 0 ({differing}): the ranks see different "
                "shards or settings. Start them again, all from the same shards."
            )


def put_on_schedule(trainer: L.Trainer) -> None:
    """Set the rates of a run that was made longer; where nothing has changed they are those of the checkpoint."""
    for config in trainer.lr_scheduler_configs:
        schedule = config.scheduler
        if isinstance(schedule, LambdaLR):
            rows = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
            for group, base, factor in rows:
                group["lr"] = base * factor(schedule.last_epoch)


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


def announce_resume(path: Path, settings: TrainSettings) -> None:
    """Print where a resumed run goes on, and what becomes of the learning rate where the run was made longer."""
    checkpoint = peek(path)
    step, steps = int(checkpoint["global_step"]), settings.schedule_steps
    announce(f"going on from step {step} to {settings.trainer.max_steps} ({path})")
    before = read_provenance(checkpoint["medsam2"], path).recipe_part("schedule").get("steps", steps)
    if before != steps:
        old, new = (settings.optim.lr * rate_at(step, length, settings.optim) for length in (before, steps))
        announce(
            f"the schedule of the learning rate was of {before} steps and is now of {steps}: at step {step} the base "
            f"rate goes from {old:.3g} to {new:.3g}. trainer.schedule_steps={before} keeps the old one, whose last "
            "rate then stays."
        )


@rank_zero_only
def announce(text: str) -> None:
    """Print one line about the run, on rank 0 alone and flushed at once."""
    print(text, flush=True)
