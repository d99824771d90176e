"""`ClipDataModule`: training batches for Lightning, or for a plain loop.

The sampler yields the remaining steps of the run, and the dataset returns the batch of this rank for a step. Resuming
at any step is therefore exact and immediate.
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

# The settings that, with the index, determine the sequence of clips. A resumed run must have the same values.
SEQUENCE_SETTINGS = (
    *("clip_frames", "max_objects", "stride_max", "reverse_probability", "absence_probability", "prompt_frame"),
    *("min_pixels", "peak_min", "peak_max", "include", "exclude", "modalities", "mixture", "temperature"),
    *("name_balance", "stills"),
)


class ClipDataModule(pl.LightningDataModule):
    """Training clips from shards.

    Args:
        settings: the `data` group.
        seed: the run's seed, from which the order of clips, their augmentation and their prompts derive.
        augment: transforms each `ClipBatch` into an `AugmentedBatch` on the device; None: batches stay `ClipBatch`.
        accumulate: loader steps per optimiser step.

    Raises:
        UserError: a folder has no index, or no eligible segment.
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

    # The plan and its figures

    @cached_property
    def catalogs(self) -> tuple[Catalog, ...]:
        """The opened shard folders."""
        return tuple(Catalog(open_store(location)) for location in self.settings.shards)

    @property
    def plan(self) -> Plan:
        """The plan of this run; before a trainer is attached, that of one rank, with the same sequence of clips."""
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
        """Return the next loader step: the number of optimiser steps so far times accumulation."""
        return int(self.trainer.global_step) * self.accumulate if self.trainer is not None else 0

    def num_steps(self) -> int:
        """Return the number of optimiser steps of the run; without a trainer, of an epoch."""
        return int(self.trainer.max_steps) if self.trainer is not None else self.settings.steps_per_epoch

    def expected_shares(self) -> list[ShareRow]:
        """Return the expected share of each dataset in an epoch, for the log at the start of a run."""
        return self.plan.expected_shares(self.settings.steps_per_epoch)

    def content_hashes(self) -> list[str]:
        """Return the sorted content hashes of all eligible cases, to be stored in checkpoints."""
        hashes = (self.catalogs[source.folder].distinct("content_hash", source.rows) for source in self.plan.sources)
        return sorted(set[str]().union(*hashes))

    def provenance(self) -> dict[str, dict[str, str]]:
        """Return "source" and "licence" of each training dataset as its shards state them, to be stored in checkpoints.

        Missing values are "". If two folders state different values for one dataset, both are returned.
        """
        summaries = [read_summary(catalog.folder).get("datasets") for catalog in self.catalogs]
        # Shards that other tools wrote may have no summary.
        statements = [summary if isinstance(summary, dict) else {} for summary in summaries]
        datasets: dict[str, dict[str, str]] = {}
        for source in self.plan.sources:
            statement = statements[source.folder].get(source.dataset, {})
            entry = datasets.setdefault(source.dataset, {"source": "", "licence": ""})
            for key, value in entry.items():
                entry[key] = "; ".join(dict.fromkeys(text for text in (value, statement.get(key, "")) if text))
        return dict(sorted(datasets.items()))

    # Loaders

    def train_dataloader(self) -> DataLoader[ClipBatch]:
        """Return a loader of the whole run, which is one epoch to Lightning; without a trainer, of one epoch."""
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
        """Return the values that must not change when a run is resumed (stored in the checkpoint)."""
        return self._identity()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a resumed run has the same seed, data and global batch size.

        Raises:
            UserError: a value differs; the message says which.
        """
        for field, value in self._identity().items():
            previous = state_dict.get(field, value)
            if previous != value:
                raise UserError(
                    f"cannot resume: {field} was {previous} and is now {value}; the order of clips would change. "
                    "Restore the old value, or start a new run from the checkpoint's weights."
                )

    def _identity(self) -> dict[str, Any]:
        settings = self.settings
        identity = {
            "seed": self.seed,
            "global batch": self.plan.global_batch,
            "training segments (hash)": self._segments_hash,
            **{f"data.{name}": str(getattr(settings, name)) for name in SEQUENCE_SETTINGS if name != "stills"},
        }
        stills = settings.stills
        if stills.share:
            identity["data.stills"] = f"{stills.share}, {stills.max_objects}, {stills.from_clips}"
            identity["global batch of stills"] = self.plan.batch_size("stills")
        return identity

    @cached_property
    def _segments_hash(self) -> str:
        digest = hashlib.sha256()
        for source in self.plan.sources:
            digest.update(self.catalogs[source.folder].digest(source.rows).encode())
        return digest.hexdigest()[:16]
