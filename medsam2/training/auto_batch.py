"""`trainer.auto_batch=true`: the largest batch that fits, found by real steps on a copy before the run begins.

The copy has a network, an optimiser and a trainer of its own and is thrown away; random numbers are seeded anew
afterwards. A run with the number that was found, given by hand, is the same run, bit for bit.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from torch import Tensor
from torch.utils.data import DataLoader

from medsam2.data.augment import AugmentedBatch
from medsam2.errors import UserError
from medsam2.model.adaptation import apply_adaptation
from medsam2.training.cases import TrainingData
from medsam2.training.machine import GIB, available, peak, reset_peak, resident, trim
from medsam2.training.memory import is_out_of_memory, largest_divisor
from medsam2.training.module import FineTuner
from medsam2.training.settings import TrainSettings
from medsam2.training.starts import starting_model

HANDED_ON = "MEDSAM2_AUTO_BATCH"  # from the process that measured to the ranks that it starts
STEPS = 2  # the optimiser's moments come into being at the end of the first

Fits = Callable[[int], bool]


@dataclass(frozen=True)
class Chosen:
    """Clips that a device takes at once, and batches accumulated for one optimiser step."""

    clips_per_batch: int
    accumulate: int

    def applied(self, settings: TrainSettings) -> TrainSettings:
        data = settings.data.model_copy(update={"clips_per_batch": self.clips_per_batch})
        trainer = settings.trainer.model_copy(
            update={"accumulate": self.accumulate, "auto_batch": False, "global_batch": None}
        )
        return settings.model_copy(update={"data": data, "trainer": trainer})


def with_largest_batch(settings: TrainSettings, module_class: type[FineTuner], before: int | None) -> TrainSettings:
    """The settings with what was found in the place of `auto_batch`.

    Args:
        before: the global batch of the run that is resumed, which stays; None for a new run.

    Raises:
        UserError: the module has no clips, not even one clip fits, the global batch cannot be divided over the ranks,
            or the ranks are started by something else, so that each would find another number.
    """
    if not module_class.needs_data:
        raise UserError(f"trainer.auto_batch=true: {settings.module} trains without clips; set it to false.")
    ranks = number_of_ranks(settings)
    whole = settings.trainer.global_batch or before
    share = None if whole is None else share_of_rank(whole, ranks)
    clips, accumulate, output = (os.environ.get(HANDED_ON) or ",,").split(",", 2)
    if output == settings.output and ranks > 1:
        return Chosen(int(clips), int(accumulate)).applied(settings)
    if ranks > 1 and {"LOCAL_RANK", "RANK", "SLURM_PROCID"} & os.environ.keys():
        raise UserError(
            "trainer.auto_batch=true: these ranks run already, and each would find a number of its own (they were "
            "started by something else than train.py, or this is a later phase). Find it once with trainer.devices=1, "
            "then give data.clips_per_batch and trainer.accumulate."
        )
    limit = min(settings.trainer.auto_batch_limit, share or settings.trainer.auto_batch_limit)
    with Trial(settings, module_class, ranks) as trial:
        found = largest(trial, limit)
        text = trial.text
    chosen = choose(found, share, settings.trainer.accumulate)
    if ranks > 1:
        os.environ[HANDED_ON] = f"{chosen.clips_per_batch},{chosen.accumulate},{settings.output}"
    total = chosen.clips_per_batch * chosen.accumulate * ranks
    print(
        f"auto_batch: {text}. This run has data.clips_per_batch={chosen.clips_per_batch} "
        f"trainer.accumulate={chosen.accumulate} on {ranks} rank{'s' * (ranks > 1)}: {total} clips an optimiser step.",
        flush=True,
    )
    return chosen.applied(settings)


def choose(found: int, share: int | None, accumulate: int) -> Chosen:
    """The largest part of `share` (clips of one step and rank) that fits, accumulated to it; all of `found` if None.

    >>> choose(16, 24, 1)
    Chosen(clips_per_batch=12, accumulate=2)
    """
    if share is None:
        return Chosen(found, accumulate)
    clips = largest_divisor(share, found)
    return Chosen(clips, share // clips)


def largest(fits: Fits, limit: int) -> int:
    """The largest power of two up to `limit`, or `limit` itself, that fits, tried in ascending order.

    Raises:
        UserError: one does not fit.
    """
    if not fits(1):
        raise UserError(
            "trainer.auto_batch=true: not even one clip fits in memory; lower data.clip_frames, data.max_objects or "
            "model.image_size, or set trainer.precision=bf16-mixed."
        )
    found = 1
    while found < limit:
        tried = min(2 * found, limit)
        if not fits(tried):
            break
        found = tried
    return found


def share_of_rank(whole: int, ranks: int) -> int:
    if whole % ranks:
        raise UserError(f"trainer.global_batch={whole} cannot be divided over {ranks} ranks; give a multiple.")
    return whole // ranks


def number_of_ranks(settings: TrainSettings) -> int:
    """Devices times nodes, as Lightning counts them."""
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    own = settings.trainer
    connector = _AcceleratorConnector(accelerator=own.accelerator, devices=own.devices, num_nodes=own.num_nodes)
    return max(len(connector._parallel_devices), 1) * own.num_nodes


# ------------------------------------------------------------------------------------------------------ one try


class Trial:
    """Callable: whether steps with so many clips fit, each with as many objects and corrections as a batch can have."""

    def __init__(self, settings: TrainSettings, module_class: type[FineTuner], ranks: int) -> None:
        prompts = settings.prompts.model_copy(update={"correction_probability": 1.0})
        validation = settings.validation.model_copy(update={"cases": 0, "clips": 0})
        keep = settings.keep.model_copy(update={"distil_on": "all"})  # at most; the copy does not know the data sets
        self.settings = settings.model_copy(update={"prompts": prompts, "validation": validation, "keep": keep})
        self.module_class, self.ranks = module_class, ranks
        self.batch: AugmentedBatch | None = None
        self.before = (0, 0)  # (clips, bytes) of the try before
        self.text = ""

    def __enter__(self) -> Trial:
        trim()
        self.free, self.base = available(), resident()
        return self

    def __exit__(self, *error: object) -> None:
        self.batch = None
        give_back()
        L.seed_everything(self.settings.seed, workers=True, verbose=False)

    def __call__(self, clips: int) -> bool:
        limit, expected = self.settings.trainer.memory_share * self.free, self._expected(clips)
        if expected > limit:
            self.text += f"; {clips} would take {expected / GIB:.2f} GiB of {limit / GIB:.2f}"
            return False
        try:
            used, on_gpu = self.step(clips)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.text += f"; {clips} do not fit"
            return False
        finally:
            give_back()
        if not on_gpu and used > limit:
            self.text += f"; {clips} take {used / GIB:.2f} GiB of {limit / GIB:.2f}"
            return False
        self.text = f"{clips} clip{'s' * (clips > 1)} at once take {used / GIB:.2f} GiB"
        self.before = (0, 0) if on_gpu else (clips, used)
        return True

    def _expected(self, clips: int) -> float:
        """Bytes in proportion to the try before: a machine without memory left would end other programs, or this one.

        On a GPU it is 0, since trying costs nothing but an error.
        """
        before, used = self.before
        return used * clips / before if before else 0.0

    def step(self, clips: int) -> tuple[int, bool]:
        """(bytes at the peak, whether of a GPU) of real steps of a trainer, as the run's own is set."""
        own = self.settings.trainer
        loaded = starting_model(self.settings)
        apply_adaptation(loaded.sam, self.settings.adaptation)
        module = self.module_class(loaded, self.settings)
        trainer = L.Trainer(
            accelerator=own.accelerator, devices=1, precision=own.precision, max_steps=STEPS, logger=False,  # type: ignore[arg-type]
            gradient_clip_val=self.settings.optim.clip, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
            plugins=[LightningEnvironment()],  # one process, whatever was launched
        )  # fmt: skip
        device = trainer.strategy.root_device
        batch = on_device(tile(self._first(), clips, self.settings.data.max_objects), device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        reset_peak()
        # DDP keeps a second copy of the gradients in its buckets.
        buckets = [torch.ones_like(p, device=device) for p in module.parameters() if p.requires_grad and self.ranks > 1]
        trainer.fit(module, datamodule=Same(batch))
        del buckets
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device), True
        return max(peak() - self.base, 0), False

    def _first(self) -> AugmentedBatch:
        """The first clips of the run, augmented, on the CPU; read once."""
        if self.batch is None:
            data = TrainingData(
                self.settings.model_copy(
                    update={"data": self.settings.data.model_copy(update={"workers": 0, "clips_per_batch": 1})}
                ),
                self.settings.model.image_size,
            )
            self.batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)  # type: ignore[assignment]
        assert isinstance(self.batch, AugmentedBatch)
        return self.batch


def give_back() -> None:
    """Return what is not used any more to the machine and to the GPU."""
    gc.collect()
    trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Same(L.LightningDataModule):
    """One batch, on its device, again and again."""

    def __init__(self, batch: AugmentedBatch) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader([self.batch] * STEPS, batch_size=None, collate_fn=lambda item: item)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch


def tile(batch: AugmentedBatch, clips: int, objects: int) -> AugmentedBatch:
    """A batch of `clips` clips with `objects` objects each, made of the first clip of `batch` and its objects."""
    own = (batch.object_to_clip == 0).nonzero()[:, 0]
    chosen = own[torch.arange(objects) % len(own)].repeat(clips)
    return replace(
        batch,
        frames=batch.frames[:1].repeat(clips, 1, 1, 1, 1),
        masks=batch.masks[chosen],
        object_to_clip=torch.arange(clips).repeat_interleave(objects),
        object_seeds=batch.object_seeds[chosen] + torch.arange(len(chosen)),
        seeds=batch.seeds[:1] + torch.arange(clips),
        names=tuple(batch.names[index] for index in chosen.tolist()),
        keys=batch.keys[:1] * clips,
        datasets=batch.datasets[:1] * clips,
        modalities=batch.modalities[:1] * clips,
    )


def on_device(batch: AugmentedBatch, device: torch.device) -> AugmentedBatch:
    moved = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **moved)  # type: ignore[arg-type]
