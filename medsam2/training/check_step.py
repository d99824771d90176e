"""`mode=check`, the step: real steps on one device, timed and weighed, on a copy that is thrown away."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from medsam2.data.loader import StepDataset
from medsam2.data.plan import Plan
from medsam2.model.adaptation import apply_adaptation
from medsam2.training.auto_batch import Trial, give_back, number_of_ranks
from medsam2.training.cases import TrainingData
from medsam2.training.keep import EmaAverage
from medsam2.training.launch import explain_launch
from medsam2.training.machine import available, peak, reset_peak, resident, trim
from medsam2.training.module import FineTuner
from medsam2.training.settings import TrainSettings
from medsam2.training.starts import starting_model

REPEATS = 3  # steps of each kind of batch; the first warms up and does not count
SEARCHED = 10_000  # loader steps among which the kinds are looked for


@dataclass(frozen=True)
class StepFigures:
    """What steps of this recipe take on one device of this machine.

    Attributes:
        device: its name.
        seconds: of a loader step by kind of batch ("clips", "stills"): augmentation, forward, backward, update.
        losses: of all steps.
        used: bytes at the peak, above what the process holds anyway; with the largest batch that can come.
        free: bytes that are free for it.
        checkpoint: bytes of one checkpoint: weights, optimiser, averages.
    """

    device: str
    seconds: dict[str, float]
    losses: list[float]
    used: int
    free: int
    checkpoint: int

    @property
    def finite(self) -> bool:
        return all(math.isfinite(loss) for loss in self.losses)


@dataclass
class Watch(Callback):
    """Times steps from the end of one to the end of the next, so that augmentation is in them, and weighs the state."""

    kinds: list[str]
    took: list[tuple[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    checkpoint: int = 0
    _begun: float = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._begun = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"]) if isinstance(outputs, Mapping) else float(outputs))  # synchronises
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.took.append((self.kinds[batch_idx % len(self.kinds)], now - self._begun))
        self._begun = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.checkpoint = tensor_bytes(trainer._checkpoint_connector.dump_checkpoint(weights_only=False))

    def seconds(self) -> dict[str, float]:
        """The mean of each kind, without its first step where there are more."""
        found: dict[str, float] = {}
        for kind in dict.fromkeys(self.kinds):
            times = [took for name, took in self.took if name == kind]
            counted = times[1:] or times
            found[kind] = sum(counted) / len(counted)
        return found


class FirstSteps(TrainingData):
    """Some batches of the run, read before they are timed; for a module without clips, nothing."""

    def __init__(self, settings: TrainSettings, image_size: int) -> None:
        super().__init__(settings, image_size)
        steps = first_of_each_kind(self.plan)
        dataset = StepDataset(self.plan)
        self.kinds = [kind for kind, _ in steps]
        self.batches = [dataset[step] for _, step in steps]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None, collate_fn=lambda item: item)  # type: ignore[arg-type]


def first_of_each_kind(plan: Plan) -> list[tuple[str, int]]:
    """(kind, step) of the first `REPEATS` steps of every kind of batch, kind by kind."""
    found: dict[str, list[int]] = {kind: [] for kind in plan.streams}
    for step in range(SEARCHED):
        if all(len(steps) == REPEATS for steps in found.values()):
            break
        steps = found[plan.kind(step)]
        if len(steps) < REPEATS:
            steps.append(step)
    return [(kind, step) for kind, steps in found.items() for step in steps]


@explain_launch
def measure_steps(settings: TrainSettings, module_class: type[FineTuner]) -> StepFigures:
    """Take a few steps of the run, then one with as many objects and corrections as a batch can have.

    Raises:
        UserError: the devices that are asked for are not here.
        RuntimeError: of torch, as the run would raise it; out of memory too.
    """
    trial = without_writing(settings)
    trim()
    free, base = available(), resident()
    loaded = starting_model(trial)
    apply_adaptation(loaded.sam, trial.adaptation)
    data = FirstSteps(trial, loaded.spec.image_size)
    watch = Watch(data.kinds)
    trainer = make_trial_trainer(trial, len(data.batches), watch)
    device = trainer.strategy.root_device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        torch.cuda.reset_peak_memory_stats(device)
    reset_peak()
    trainer.fit(module_class(loaded, trial), datamodule=data)
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else max(peak() - base, 0)
    del trainer, data, loaded
    give_back()
    with Trial(trial, module_class, number_of_ranks(settings)) as worst:
        largest, _ = worst.step(trial.data.clips_per_batch)
    give_back()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return StepFigures(name, watch.seconds(), watch.losses, max(used, largest), free, watch.checkpoint)


def without_writing(settings: TrainSettings) -> TrainSettings:
    """The recipe without what scores, stops or writes; one batch an optimiser step, read in this process."""
    keep = settings.keep.model_copy(update={"interpolate": ()})
    validation = settings.validation.model_copy(update={"cases": 0, "clips": 0, "patience": None})
    data = settings.data.model_copy(update={"workers": 0})
    trainer = settings.trainer.model_copy(update={"accumulate": 1})
    return settings.model_copy(
        update={"keep": keep, "validation": validation, "data": data, "trainer": trainer, "logger": ()}
    )


def make_trial_trainer(settings: TrainSettings, steps: int, watch: Watch) -> L.Trainer:
    """The run's trainer on one device of this machine, however many processes were launched."""
    own = settings.trainer
    used: list[Callback] = [watch]
    if settings.ema is not None:
        used.append(EmaAverage(settings.ema))
    return L.Trainer(
        accelerator=own.accelerator, devices=1, precision=own.precision, max_steps=steps, logger=False,  # type: ignore[arg-type]
        gradient_clip_val=settings.optim.clip, deterministic=own.deterministic, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
        callbacks=used, plugins=[LightningEnvironment()], use_distributed_sampler=False,
    )  # fmt: skip


def tensor_bytes(found: Any) -> int:
    """Bytes of all tensors in nested mappings and sequences."""
    if isinstance(found, Tensor):
        return found.numel() * found.element_size()
    if isinstance(found, Mapping):
        return sum(tensor_bytes(value) for value in found.values())
    if isinstance(found, list | tuple):
        return sum(tensor_bytes(value) for value in found)
    return 0
