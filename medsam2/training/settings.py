"""The configuration of a training run, validated once at the start (configs/train.yaml and its groups)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from medsam2.data.augment_settings import AugmentSettings
from medsam2.data.settings import DataSettings
from medsam2.evaluation.settings import ProtocolSettings
from medsam2.model.adaptation import AdaptationSettings
from medsam2.model.losses import LossSettings
from medsam2.prompts.settings import PromptSettings
from medsam2.training.optim import OptimSettings


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(_Strict):
    """Size, version ("2.1" or "2.0") and input side of the network; see `medsam2 models`."""

    name: str = "hiera_nano"
    version: str = "2.1"
    image_size: int = Field(128, ge=32)


class TrainerSettings(_Strict):
    """What is handed to Lightning's Trainer, and how often things happen.

    Attributes:
        max_steps: optimiser steps of the run; steps, not epochs, are the clock.
        val_every, checkpoint_every, log_every: in optimiser steps.
        threads: torch threads of each process, None for torch's own choice.
        progress: "bar" on a terminal and lines elsewhere ("auto"), always "bar", "lines", or "none".
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
    deterministic: bool = False
    detect_anomaly: bool = False
    profiler: str | None = None
    progress: Literal["auto", "bar", "lines", "none"] = "auto"


class ValidationSettings(_Strict):
    """Validation on the val split: whole cases with evaluation's predictor and metrics, and the loss of fixed clips.

    Attributes:
        cases: at most so many whole cases of each data set (0: none).
        clips: at most so many clips, spread over the split, with fixed frames, objects and prompts and without
            augmentation; their mean loss is `val/loss` (0: none). It tells overfitting early, and decides which
            checkpoint is the best where there are no cases.
        protocols: the protocols to run; the best checkpoint has the highest mean DSC over all of them.
    """

    cases: int = Field(4, ge=0)
    clips: int = Field(0, ge=0)
    protocols: tuple[ProtocolSettings, ...] = (ProtocolSettings(name="largest_box_both"),)


class PhaseSettings(_Strict):
    """One phase of a curriculum: a name, and what differs from the run's own configuration."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    override: dict[str, Any] = Field(default_factory=dict)


class TrainSettings(_Strict):
    """One complete recipe.

    Attributes:
        start: where weights come from: "nano", "random", or the path of an official or medsam2 checkpoint.
        output: the run folder; refused if it holds something, unless `resume` is given.
        resume: go on with an interrupted run: "auto" (its own last checkpoint) or a path.
        module: dotted path of the LightningModule; yours may take the place of ours.
        ema: decay of the exponential moving average of the weights, None for none.
        phases: a curriculum; each phase starts from the one before and runs in its own sub-folder.
        mode: "train".
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
    logger: tuple[Literal["csv", "wandb"], ...] = ("csv",)
    start: str = "nano"
    output: str
    resume: str | None = None
    seed: int = Field(0, ge=0)
    module: str = "medsam2.training.module.FineTuner"
    ema: float | None = Field(None, gt=0, lt=1)
    phases: tuple[PhaseSettings, ...] = ()
    mode: Literal["train"] = "train"
