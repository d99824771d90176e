"""Out of memory: an error that says which settings to lower, and to what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from medsam2.data.augment import AugmentedBatch
from medsam2.errors import UserError
from medsam2.training.machine import GIB, available, resident
from medsam2.training.settings import TrainSettings

CPU_ALLOCATOR = "DefaultCPUAllocator"  # torch raises a plain RuntimeError where the machine's memory ends


@dataclass(frozen=True)
class BatchSize:
    """What the memory of a step grows with: clips, frames of each, objects of all clips, side of the model's input."""

    clips: int
    frames: int
    objects: int
    side: int

    def __str__(self) -> str:
        return f"{self.clips} clips of {self.frames} frames of {self.side} px with {self.objects} objects in all"


class LastBatch(Callback):
    """Remembers how large the batch is that is being computed."""

    size: BatchSize | None = None

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        self.size = size_of(batch)


def size_of(batch: Any) -> BatchSize | None:
    """The size of a training batch, None for what is not one."""
    if not isinstance(batch, AugmentedBatch):
        return None
    clips, frames, _, side, _ = batch.frames.shape
    return BatchSize(clips, frames, batch.num_objects, side)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's or the machine's memory has ended."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)


def explain_out_of_memory(error: BaseException, settings: TrainSettings, trainer: L.Trainer) -> UserError:
    """What to lower, in the order of what it costs in quality: nothing, then little, then more."""
    size = next((c.size for c in trainer.callbacks if isinstance(c, LastBatch)), None)  # type: ignore[attr-defined]
    text = str(error).strip() or type(error).__name__
    batch = f"with a batch of {size}" if size else "before the first batch"
    lines = "\n".join(f"  - {line}" for line in advice(settings, size))
    return UserError(
        f"out of memory at step {trainer.global_step} {batch}, {memory_in_use(trainer)}: {text.splitlines()[0]}\n"
        f"Lower one of these, and go on by resume=auto where that is said to be possible:\n{lines}"
    )


def advice(settings: TrainSettings, size: BatchSize | None = None) -> list[str]:
    """Lines `setting old -> new: what it does`, for the settings that can still be lowered."""
    data, own, found = settings.data, settings.trainer, []
    if data.clips_per_batch > 1:
        half = largest_divisor(data.clips_per_batch, data.clips_per_batch // 2)
        more = own.accumulate * data.clips_per_batch // half
        found.append(
            f"data.clips_per_batch={half} trainer.accumulate={more} (now {data.clips_per_batch} and {own.accumulate}): "
            f"{half / data.clips_per_batch:.0%} of the activations and the same result; resume=auto goes on; "
            "trainer.auto_batch=true finds the largest number"
        )
    if own.precision == "32-true":
        found.append(
            "trainer.precision=bf16-mixed (now 32-true): most activations take half the bytes; resume=auto goes on"
        )
    found += [f"{line}; resume=auto goes on" for line in checkpointing(settings)]
    if data.max_objects > 1:
        half = data.max_objects // 2
        share = f" (this batch has {size.objects} in {size.clips} clips)" if size else ""
        found.append(
            f"data.max_objects={half} (now {data.max_objects}){share}: tracking takes {half / data.max_objects:.0%} of "
            "its memory; another run"
        )
    if data.clip_frames > 2:
        half = data.clip_frames // 2
        found.append(
            f"data.clip_frames={half} (now {data.clip_frames}): {half / data.clip_frames:.0%} of all activations; "
            "another run"
        )
    if settings.model.image_size >= 256:
        half = settings.model.image_size // 2
        found.append(
            f"model.image_size={half} (now {settings.model.image_size}): a quarter of all activations; another run"
        )
    if settings.adaptation.train == ("all",) and not settings.adaptation.freeze:
        found.append("adaptation=decoder (now the whole model): the encoder keeps no activations; another run")
    return found or ["nothing is left to lower in this recipe: take a smaller model= or a larger device"]


def checkpointing(settings: TrainSettings) -> list[str]:
    """Activation checkpointing of the encoder, whose activations are the most, where it is not on yet."""
    on = settings.model.checkpoint
    if "image_encoder" in on:
        return []
    parts = ",".join([*on, "image_encoder"])
    return [f"model.checkpoint=[{parts}] (now {list(on)}): the encoder computes its activations twice and keeps few"]


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`.

    >>> largest_divisor(12, 5)
    4
    """
    return next(divisor for divisor in range(min(limit, number), 0, -1) if number % divisor == 0)


def memory_in_use(trainer: L.Trainer) -> str:
    """How much is in use of how much, on the run's device."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return f"{(total - free) / GIB:.1f} of {total / GIB:.1f} GiB of the GPU in use"
    return f"{resident() / GIB:.1f} GiB in use, {available() / GIB:.1f} GiB of the machine left"
