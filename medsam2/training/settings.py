"""The configuration of a training run, validated once at the start (configs/train.yaml and its groups)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from medsam2.adaptation.freeze import AdaptationSettings
from medsam2.data.settings import AugmentSettings, DataSettings, Strict
from medsam2.evaluation.settings import ProtocolSettings
from medsam2.fast.execution import SpeedSettings
from medsam2.model.losses import LossSettings
from medsam2.model.memory_bank import MemorySettings
from medsam2.prompts.settings import PromptSettings
from medsam2.training.optim import OptimSettings
from medsam2.training.retention import RetentionSettings


class ModelSettings(SpeedSettings):
    """Size, version and input side of the network (see `medsam2 models`), and how it is run.

    Attributes:
        name: size of the network: hiera_nano, hiera_tiny, hiera_small, hiera_base_plus or hiera_large.
        version: of SAM 2, "2.1" or "2.0".
        image_size: side in pixels of the square that frames are resized to.
    """

    name: str = "hiera_nano"
    version: str = "2.1"
    image_size: int = Field(128, ge=32)


class TrainerSettings(Strict):
    """What is handed to Lightning's Trainer, and how often things happen.

    Attributes:
        accelerator: "cpu", "gpu" or "auto".
        devices: number of devices of each node, "auto" for all, or their numbers ("0,2").
        num_nodes: number of machines.
        strategy: of Lightning; "ddp_find_unused_parameters_true" on several devices, else "auto".
        precision: "32-true", "bf16-mixed" (CPU and GPU) or "16-mixed" (GPU only).
        max_steps: optimiser steps of the run; steps, not epochs, are the clock.
        accumulate: batches of each rank whose gradients make one optimiser step.
        val_every, checkpoint_every, log_every: time between validations, checkpoints or rows of metrics.csv, in steps.
        threads: torch threads of each process, None for torch's own choice.
        detect_anomaly: name the operation that made a NaN, at a third of the speed.
        profiler: of Lightning, e.g. "simple"; None for none.
        progress: "bar" on a terminal and lines elsewhere ("auto"), always "bar", "lines", or "none".
        schedule_steps: the length of the learning rate's schedule; None takes max_steps. A run that may be made longer
            is begun with the length that it may reach; a longer one keeps its last rate beyond it.
        max_bad_steps: so many skipped steps in a row (loss or gradient not finite) end the run.
        requeue: whether a SLURM job that a signal has stopped is queued again: on SIGUSR1 ("auto"), on any, or never.
        timeout_minutes: so long ranks wait for each other in one exchange before the run ends.
    """

    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = Field(1, ge=1)
    strategy: str = "auto"
    precision: str = "32-true"
    max_steps: int = Field(1000, ge=1)
    accumulate: int = Field(1, ge=1)
    val_every: int = Field(200, ge=1)
    checkpoint_every: int = Field(200, ge=1)
    log_every: int = Field(10, ge=1)
    threads: int | None = Field(None, ge=1)
    detect_anomaly: bool = False
    profiler: str | None = None
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    schedule_steps: int | None = Field(None, ge=1)
    max_bad_steps: int = Field(10, ge=1)
    requeue: Literal["auto"] | bool = "auto"
    timeout_minutes: float = Field(30.0, gt=0)

    @model_validator(mode="after")
    def _precision_fits_the_device(self) -> TrainerSettings:
        on_cpu = self.accelerator == "cpu" or (self.accelerator == "auto" and not torch.cuda.is_available())
        if on_cpu and self.precision in ("16-mixed", "16-true"):
            raise ValueError(
                f"precision={self.precision} needs a GPU (its small gradients need a scaler that CPUs lack); give "
                "bf16-mixed or 32-true"
            )
        return self


class TradeoffSettings(Strict):
    """Weights of gain and retention.

    Attributes:
        gain: weight of the change of DSC on what is learned.
        retention: weight of what is lost on what was known; getting better there does not make up for a missing gain.
        allowed: so much of DSC may be lost at no cost.
    """

    gain: float = Field(1.0, ge=0)
    retention: float = Field(1.0, ge=0)
    allowed: float = Field(0.0, ge=0, le=1)


class ValidationSettings(Strict):
    """Validation on the val split: whole cases with evaluation's predictor and metrics, and the loss of fixed clips.

    Attributes:
        cases: at most so many whole cases of each data set (0: none).
        clips: at most so many clips, spread over the split, with fixed frames, objects and prompts and without
            augmentation; their mean loss is `val/loss` (0: none). It tells overfitting early, and decides which
            checkpoint is the best where there are no cases.
        protocols: the protocols to run; the best checkpoint has the highest mean DSC over all of them.
        general: shards of general data, of whose `val_split` as many cases of each data set show what the starting
            model knew (`val/retention`), beside the run's own data sets that `retention` calls old.
        tradeoff: weights of gain and retention; the best checkpoint is then the one with the highest `val/tradeoff`.
        pictures: overlays of at most so many fixed clips at each validation, one of each modality and structure; they
            need `cases`.
        patience: the run stops after so many validations without a better one; None: never.
    """

    cases: int = Field(4, ge=0)
    clips: int = Field(0, ge=0)
    protocols: tuple[ProtocolSettings, ...] = (ProtocolSettings(name="largest_box_both"),)
    general: tuple[str, ...] = ()
    tradeoff: TradeoffSettings | None = None
    pictures: int = Field(6, ge=0)
    patience: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _has_cases(self) -> ValidationSettings:
        for name in ("general", "tradeoff"):
            if getattr(self, name) and not self.cases:
                raise ValueError(f"{name} is measured on whole cases; set validation.cases to 1 or more")
        return self


class TrainSettings(Strict):
    """One complete recipe.

    Attributes:
        start: a new run whose weights come from here: "nano", "random", or the path of any SAM 2 checkpoint
            (official, ours, Lightning's, a run, an export or an adapter).
        output: the run folder; refused if it holds something, unless `resume` is given.
        resume: the same run goes on, exactly: "auto" (its own last checkpoint) or a path.
        seed: of the order of clips, augmentation, prompts and dropout.
        deterministic: bit-identical runs on a CPU, and slower kernels on a GPU.
        module: dotted path of the LightningModule; yours may take the place of ours.
        retention: what is not forgotten: replay, L2 towards the start, distillation, interpolation.
        memory: the policy of the memory bank (configs/memory/): of whole cases in validation, and of training clips
            where it is made for them (`MemoryPolicy.in_clips`).
        logger: by name, what Hydra instantiates (`configs/logger/`); metrics.csv is written in any case.
        callbacks: by name, what Hydra instantiates (`configs/callbacks/`), beside those that a run cannot do without.
        ema: decay of the exponential moving average of the weights, None for none.
        mode: "train", or "check" (`check.py`): a few steps, estimates, and nothing written; train.py chooses.
    """

    model: ModelSettings = ModelSettings()
    adaptation: AdaptationSettings = AdaptationSettings()
    prompts: PromptSettings = PromptSettings()
    loss: LossSettings = LossSettings()
    data: DataSettings
    augment: AugmentSettings = AugmentSettings()
    optim: OptimSettings = OptimSettings()
    trainer: TrainerSettings = TrainerSettings()
    validation: ValidationSettings = ValidationSettings()
    retention: RetentionSettings = RetentionSettings()
    memory: MemorySettings = MemorySettings()
    logger: dict[str, dict[str, Any]] = Field(default_factory=dict)
    callbacks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    start: str = "nano"
    output: str
    resume: str | None = None
    seed: int = Field(0, ge=0)
    deterministic: bool = False
    module: str = "medsam2.training.module.FineTuner"
    ema: float | None = Field(None, gt=0, lt=1)
    mode: Literal["train", "check"] = "train"

    @model_validator(mode="before")
    @classmethod
    def _group_has_its_new_name(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "keep" in values:
            raise ValueError("the group `keep` is called `retention` now; rename it in your configuration file")
        return values

    @model_validator(mode="after")
    def _interpolation_is_scored(self) -> TrainSettings:
        if self.retention.interpolate and not self.validation.cases:
            raise ValueError("retention.interpolate is scored on whole cases; set validation.cases to 1 or more")
        return self

    @property
    def schedule_steps(self) -> int:
        """The length of the learning rate's schedule in optimiser steps."""
        return self.trainer.schedule_steps or self.trainer.max_steps
