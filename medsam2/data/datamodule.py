"""`ClipDataModule`: the plan behind plain PyTorch loaders, for Lightning or alone.

The loader's sampler is the range of steps still to be done, and its dataset turns a step into this rank's whole
batch. Resuming at step n is therefore exact and costs nothing.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from medsam2.data.augment.augment import Augment, AugmentedBatch
from medsam2.data.batch import ClipBatch
from medsam2.data.plan.plan import Plan, ShareRow
from medsam2.data.read.catalog import Catalog
from medsam2.data.read.damage_budget import DamageBudget
from medsam2.data.read.reader import StepDataset, StepLoader, StepSampler
from medsam2.data.read.store import open_store
from medsam2.data.settings import DataSettings
from medsam2.errors import UserError
from medsam2.shards.index import read_summary

# What the order and the choice of clips depend on beside the index: a resumed run must not differ in any of it.
ORDER = (
    *("clip_frames", "max_objects", "stride_max", "reverse_probability", "absence_probability", "prompt_frame"),
    *("min_pixels", "peak_min", "peak_max", "include", "exclude", "modalities", "mixture", "temperature"),
    *("name_balance", "stills"),
)


class ClipDataModule(pl.LightningDataModule):
    """Training clips from shards; batches arrive augmented when `augment` is given.

    Args:
        settings: the `data` group.
        seed: the run's seed; the order of clips, their augmentation and prompts follow from it.
        augment: batches reach the step as `AugmentedBatch`; None: they stay `ClipBatch`.
        accumulate: loader steps of one optimiser step.

    Raises:
        UserError: a folder has no index, or nothing in it may be trained on.
    """

    def __init__(
        self,
        settings: DataSettings,
        seed: int = 0,
        augment: Augment | None = None,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.seed = seed
        self.accumulate = accumulate
        self._augment = augment
        self._plan: Plan | None = None
        self.damage_budget = DamageBudget(settings.max_lost_share)

    # What the training asks

    @cached_property
    def catalogs(self) -> tuple[Catalog, ...]:
        """The opened shard folders."""
        return tuple(Catalog(open_store(location)) for location in self.settings.shards)

    @property
    def plan(self) -> Plan:
        """The plan of this run. Before a trainer is attached it is that of one rank; the order is the same."""
        global_batch = self.settings.clips_per_batch * self.world * self.accumulate
        if self._plan is None or self._plan.global_batch != global_batch:
            Catalog.check_patients(self.catalogs)
            self._plan = Plan(self.catalogs, self.settings, self.seed, global_batch)
        return self._plan

    @property
    def world(self) -> int:
        return int(self.trainer.world_size) if self.trainer is not None else 1

    @property
    def rank(self) -> int:
        return int(self.trainer.global_rank) if self.trainer is not None else 0

    def next_step(self) -> int:
        """The next loader step: optimiser steps done times accumulation."""
        return int(self.trainer.global_step) * self.accumulate if self.trainer is not None else 0

    def num_steps(self) -> int:
        """Optimiser steps of the run; those of an epoch where no trainer says how many."""
        return int(self.trainer.max_steps) if self.trainer is not None else self.settings.steps_per_epoch

    def expected_shares(self) -> list[ShareRow]:
        """Expected share of every dataset in an epoch, to be logged at the start."""
        return self.plan.expected_shares(self.settings.steps_per_epoch)

    def content_hashes(self) -> list[str]:
        """Sorted content hashes of all cases that may be trained on: a checkpoint carries them."""
        found: set[str] = set()
        for source in self.plan.sources:
            found.update(self.catalogs[source.folder].distinct("content_hash", source.rows))
        return sorted(found)

    def provenance(self) -> dict[str, dict[str, str]]:
        """Source and licence of every training dataset, as its shards state them ("" where they do not).

        A checkpoint carries them. Where two folders state different things of one dataset, both are kept.
        """
        found: dict[str, dict[str, str]] = {}
        for source in self.plan.sources:
            stated = self._stated[source.folder].get(source.dataset, {})
            entry = found.setdefault(source.dataset, {"source": "", "licence": ""})
            for key, before in entry.items():
                said = {text: None for text in (before, stated.get(key, "")) if text}
                entry[key] = "; ".join(said)
        return dict(sorted(found.items()))

    # Loaders

    def train_dataloader(self) -> DataLoader[ClipBatch]:
        """The whole run as one epoch of Lightning's; without a trainer, the clips of one epoch."""
        dataset = StepDataset(self.plan, self.rank, self.world, self.accumulate)
        workers = self.settings.workers
        return StepLoader(
            dataset,
            batch_size=None,
            sampler=StepSampler(self.num_steps() * self.accumulate, self.next_step),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
        )

    # Lightning's hooks

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if not isinstance(batch, ClipBatch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        self.damage_budget.add(len(batch.keys), batch.damaged_keys)
        return batch.to(device, non_blocking=True)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> ClipBatch | AugmentedBatch:
        if self._augment is None or not isinstance(batch, ClipBatch):
            return batch
        training = self.trainer is None or self.trainer.training
        return self._augment(batch, augment=training)

    def state_dict(self) -> dict[str, Any]:
        """What must be the same when a run goes on (stored in the checkpoint)."""
        return self._identity()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with another seed, data or global batch, naming the field.

        Raises:
            UserError: something differs.
        """
        for field, now in self._identity().items():
            before = state_dict.get(field, now)
            if before != now:
                raise UserError(
                    f"cannot resume: {field} was {before} and is now {now}; the order of clips would change. "
                    "Give the old value, or start a new run from the checkpoint's weights."
                )

    def _identity(self) -> dict[str, Any]:
        own = self.settings
        identity = {
            "seed": self.seed,
            "global batch": self.plan.global_batch,
            "training segments (hash)": self._segments_hash,
            **{f"data.{name}": str(getattr(own, name)) for name in ORDER if name != "stills"},
        }
        if own.stills.share:
            identity["data.stills"] = f"{own.stills.share}, {own.stills.max_objects}, {own.stills.from_clips}"
            identity["global batch of stills"] = self.plan.batch_size("stills")
        return identity

    @cached_property
    def _stated(self) -> list[dict[str, dict[str, str]]]:
        """What each folder's `index.json` says of its datasets; shards from elsewhere may have none."""
        stated = [read_summary(catalog.folder).get("datasets") for catalog in self.catalogs]
        return [datasets if isinstance(datasets, dict) else {} for datasets in stated]

    @cached_property
    def _segments_hash(self) -> str:
        digest = hashlib.sha256()
        for source in self.plan.sources:
            digest.update(self.catalogs[source.folder].digest(source.rows).encode())
        return digest.hexdigest()[:16]
