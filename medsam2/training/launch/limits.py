"""Limits of the machine: memory, open files, shared memory. Errors name the settings to lower, and their values."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
from lightning.pytorch.callbacks import Callback

from medsam2.data.augment.augment import AugmentedBatch
from medsam2.errors import UserError, first_line
from medsam2.training.settings import TrainSettings

CPU_ALLOCATOR = "DefaultCPUAllocator"  # torch raises a plain RuntimeError where the machine's memory ends
CGROUP = Path("/sys/fs/cgroup")
PROCESS_FILES, WORKER_FILES = 64, 24  # open files of a training process, and of each of its workers on top
MAX_OPEN_FILES = 65536
WORKER_LIMIT_SIGNS = ("bus error", "shared memory", "shm", "too many open files", "ancdata", "errno 24")


class LastBatch(Callback):
    """Remembers the size of the batch that is being computed, in words; "" before the first one."""

    size = ""

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        if isinstance(batch, AugmentedBatch):
            clips, frames, _, side, _ = batch.frames.shape
            self.size = f"{clips} clips of {frames} frames of {side} px with {batch.num_objects} objects in all"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the device or of the machine is exhausted."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)


def explain_out_of_memory(error: BaseException, settings: TrainSettings, trainer: L.Trainer) -> UserError:
    """Build the error, with the settings to lower sorted by their cost in quality, the cheapest first."""
    size = next((c.size for c in trainer.callbacks if isinstance(c, LastBatch)), "")  # type: ignore[attr-defined]
    batch = f"with a batch of {size}" if size else "before the first batch"
    lines = "\n".join(f"  - {line}" for line in advice(settings))
    return UserError(
        f"out of memory at step {trainer.global_step} {batch}: {first_line(error)}\n"
        f"Lower one of these settings; where the line says so, resume=auto goes on with the run:\n{lines}"
    )


def advice(settings: TrainSettings) -> list[str]:
    """Lines `setting=new (now old): effect`, for the settings that can still be lowered."""
    data, accumulate, lines = settings.data, settings.trainer.accumulate, []
    if data.clips_per_batch > 1:
        half = largest_divisor(data.clips_per_batch, data.clips_per_batch // 2)
        lines.append(
            f"data.clips_per_batch={half} trainer.accumulate={accumulate * data.clips_per_batch // half} (now "
            f"{data.clips_per_batch} and {accumulate}): {half / data.clips_per_batch:.0%} of the activations, the same "
            "clips in each step; resume=auto goes on"
        )
    if settings.trainer.precision == "32-true":
        lines.append(
            "trainer.precision=bf16-mixed (now 32-true): most activations take half the bytes; resume=auto goes on"
        )
    if "image_encoder" not in settings.model.checkpoint:
        parts = ",".join([*settings.model.checkpoint, "image_encoder"])
        lines.append(
            f"model.checkpoint=[{parts}] (now {list(settings.model.checkpoint)}): the encoder computes its activations "
            "twice and keeps few; resume=auto goes on"
        )
    for key, value, minimum, effect in (
        ("data.max_objects", data.max_objects, 2, "tracking takes half of its memory"),
        ("data.clip_frames", data.clip_frames, 3, "half of all activations"),
        ("model.image_size", settings.model.image_size, 256, "a quarter of all activations"),
    ):
        if value >= minimum:
            lines.append(f"{key}={value // 2} (now {value}): {effect}; another run")
    if settings.adaptation.train == ("all",) and not settings.adaptation.freeze:
        lines.append("adaptation=decoder (now the whole model): the encoder keeps no activations; another run")
    return lines or ["nothing is left to lower in this recipe: take a smaller model= or a larger device"]


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`.

    >>> largest_divisor(12, 5)
    4
    """
    return next(divisor for divisor in range(min(limit, number), 0, -1) if number % divisor == 0)


def free_memory() -> int:
    """Bytes that can still be used: of the machine, or of the container where that has a limit."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    return max(min(free, limit - used), 0)


# ------------------------------------------------------------------------------------- open files, shared memory


def allow_open_files(workers: int) -> None:
    """Raise this process's limit of open files as far as the system allows.

    Raises:
        UserError: the limit stays too low for `workers`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        soft = limit
    needed = PROCESS_FILES + WORKER_FILES * workers
    if workers and soft != resource.RLIM_INFINITY and soft < needed:
        raise UserError(
            f"a process may have {soft} files open here, and data.workers={workers} needs about {needed}; raise the "
            f"limit (`ulimit -n 4096`; LimitNOFILE of a service, --ulimit of docker), or give data.workers="
            f"{max(0, (soft - PROCESS_FILES) // WORKER_FILES)}."
        )


def is_worker_limit(error: BaseException) -> bool:
    """Whether the loader failed for want of shared memory or open files."""
    text = str(error).lower()
    return isinstance(error, OSError | RuntimeError) and any(sign in text for sign in WORKER_LIMIT_SIGNS)


def explain_worker_limit(workers: int) -> UserError:
    """Build the error for a worker that ran out of shared memory or open files."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return UserError(
        f"a process that loads data (data.workers={workers}) ran out of shared memory (/dev/shm) or open files (a "
        f"process may have {files}). Give the container more (docker run --shm-size=8g or --ipc=host; in "
        "Kubernetes an emptyDir of medium Memory at /dev/shm), raise `ulimit -n`, lower data.workers or "
        "data.clips_per_batch, or load in the process itself by data.workers=0."
    )
