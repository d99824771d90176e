"""`ClipDataModule`: the plan behind plain PyTorch loaders, for Lightning or alone.

The loader's sampler is the range of steps still to be done, and its data set turns a step into this rank's whole
batch. Resuming at step n is therefore exact and costs nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from medsam2.data.augment import Augment, AugmentedBatch
from medsam2.data.augment_settings import AugmentSettings
from medsam2.data.batch import ClipBatch
from medsam2.data.catalog import Catalog
from medsam2.data.plan import Plan, PlanEntry, ShareRow, validation_entries
from medsam2.data.reader import Reader, Replacing, stack
from medsam2.data.settings import DataSettings
from medsam2.errors import UserError
from medsam2.shards.index import JSON


class StepDataset(Dataset[ClipBatch]):
    """Loader step -> the batch of one rank.

    Args:
        plan: its global batch is that of one loader step over all ranks.
        rank, world: this process and how many there are.
        accumulate: loader steps of one optimiser step; a batch carries the optimiser step, so that what a batch
            shares is the same whether ranks or accumulation make up the global batch.
    """

    def __init__(self, plan: Plan, rank: int = 0, world: int = 1, accumulate: int = 1) -> None:
        if plan.global_batch % world:
            raise ValueError(f"a global batch of {plan.global_batch} does not split over {world} ranks")
        self.plan = plan
        self.rank = rank
        self.local = plan.global_batch // world
        self.accumulate = accumulate
        self.load = Replacing(Reader(plan.catalogs), plan.entry, plan.settings.max_lost_share)

    def __getitem__(self, step: int) -> ClipBatch:
        loaded = [self.load(entry) for entry in self.plan.slice(step, self.rank * self.local, self.local)]
        return stack(
            [clip for clip, _, _ in loaded],
            [entry.seed for _, entry, _ in loaded],
            step // self.accumulate,
            tuple(key for _, _, lost in loaded for key in lost),
        )


class FixedDataset(Dataset[ClipBatch]):
    """Batches of fixed entries: item i holds entries i * size ... of this rank's share."""

    def __init__(self, catalogs: Sequence[Catalog], entries: Sequence[PlanEntry], size: int) -> None:
        self.entries = tuple(entries)
        self.size = size
        self.load = Replacing(Reader(catalogs), None, 0.0)

    def __len__(self) -> int:
        return -(-len(self.entries) // self.size)

    def __getitem__(self, index: int) -> ClipBatch:
        entries = self.entries[index * self.size : (index + 1) * self.size]
        return stack([self.load(entry)[0] for entry in entries], [entry.seed for entry in entries], index)


class StepSampler(DistributedSampler[int]):
    """The loader steps that are left of an epoch, asked of the trainer when the epoch begins.

    It is a `DistributedSampler` in name only: Lightning would replace any other sampler on several ranks, and the
    steps of the plan are already split over them.
    """

    def __init__(self, length: int, module: ClipDataModule | None = None) -> None:
        self.length = length
        self.module = module

    def __iter__(self) -> Iterator[int]:
        start = self.module.next_step() if self.module is not None else 0
        return iter(range(start, (start // self.length + 1) * self.length))

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """The plan counts steps and needs no epoch."""


class StepLoader(DataLoader[ClipBatch]):
    """A `DataLoader` whose whole state is the trainer's step (Lightning asks loaders that can resume for it)."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: `StepSampler` reads the step from the trainer."""


class ClipDataModule(pl.LightningDataModule):
    """Train and validation clips from shards; batches arrive augmented when `augment` is given.

    Args:
        settings: the `data` group.
        seed: the run's seed; the order of clips, their augmentation and prompts follow from it.
        augment: the `augment` group; with `image_size`, batches reach the step as `AugmentedBatch`.
            None: they stay `ClipBatch`.
        image_size: the side S of the model's input.
        accumulate: loader steps of one optimiser step; None takes the trainer's.

    Raises:
        UserError: a folder has no index, or nothing in it may be trained on.
    """

    def __init__(
        self,
        settings: DataSettings,
        seed: int = 0,
        augment: AugmentSettings | None = None,
        image_size: int | None = None,
        accumulate: int | None = None,
    ) -> None:
        super().__init__()
        if (augment is None) != (image_size is None):
            raise ValueError("augment and image_size come together")
        self.settings = settings
        self.seed = seed
        self._accumulate = accumulate
        self._augment = Augment(augment, image_size) if augment is not None and image_size is not None else None
        self._plan: Plan | None = None
        self.lost: list[str] = []

    # What the training asks

    @cached_property
    def catalogs(self) -> tuple[Catalog, ...]:
        """The opened shard folders."""
        return tuple(Catalog(folder) for folder in self.settings.shards)

    @property
    def plan(self) -> Plan:
        """The plan of this run. Before a trainer is attached it is that of one rank; the order is the same."""
        global_batch = self.settings.clips_per_batch * self.world
        if self._plan is None or self._plan.global_batch != global_batch:
            self._plan = Plan(self.catalogs, self.settings, self.seed, global_batch)
        return self._plan

    @property
    def world(self) -> int:
        return int(self.trainer.world_size) if self.trainer is not None else 1

    @property
    def rank(self) -> int:
        return int(self.trainer.global_rank) if self.trainer is not None else 0

    @property
    def accumulate(self) -> int:
        if self._accumulate is not None:
            return self._accumulate
        return int(self.trainer.accumulate_grad_batches) if self.trainer is not None else 1

    def next_step(self) -> int:
        """The next loader step: optimiser steps done times accumulation."""
        return int(self.trainer.global_step) * self.accumulate if self.trainer is not None else 0

    def expected_shares(self) -> list[ShareRow]:
        """Expected share of every data set in an epoch, to be logged at the start."""
        clips = self.settings.steps_per_epoch * self.accumulate * self.plan.global_batch
        return self.plan.expected_shares(clips)

    def content_hashes(self) -> list[str]:
        """Sorted content hashes of all cases that may be trained on: a checkpoint carries them."""
        return sorted(
            {text for s in self.plan.sources for text in self.catalogs[s.folder].texts("content_hash", s.rows)}
        )

    def provenance(self) -> dict[str, dict[str, str]]:
        """Source and licence of every training data set, as its shards state them ("" where they do not).

        A checkpoint carries them. Where two folders state different things of one data set, both are kept.
        """
        found: dict[str, dict[str, str]] = {}
        for source in self.plan.sources:
            stated = self._stated[source.folder].get(source.dataset, {})
            entry = found.setdefault(source.dataset, {"source": "", "licence": ""})
            for key, before in entry.items():
                said = {text: None for text in (before, stated.get(key, "")) if text}
                entry[key] = "; ".join(said)
        return dict(sorted(found.items()))

    def statistics(self) -> list[dict[str, Any]]:
        """For each training data set: segments, cases, patients, frames, and how many usable objects each name has."""
        rows = []
        for source in self.plan.sources:
            catalog = self.catalogs[source.folder]
            names = {catalog.names[code]: int(count) for code, count in enumerate(source.name_counts) if count}
            rows.append(
                {
                    "source": source.label,
                    "modality": source.modality,
                    "segments": len(source.rows),
                    "cases": source.cases,
                    "patients": len(set(catalog.texts("patient", source.rows))),
                    "frames": int(catalog.frame_counts[source.rows].sum()),
                    "objects": dict(sorted(names.items())),
                }
            )
        return rows

    # Loaders

    def train_dataloader(self) -> DataLoader[ClipBatch]:
        dataset = StepDataset(self.plan, self.rank, self.world, self.accumulate)
        return self._loader(dataset, StepSampler(self.settings.steps_per_epoch * self.accumulate, self))

    def val_dataloader(self) -> DataLoader[ClipBatch]:
        """Fixed clips of `val_split`, each exactly once over all ranks (ranks may differ by one batch)."""
        entries = validation_entries(self.catalogs, self.settings)[self.rank :: self.world]
        dataset = FixedDataset(self.catalogs, entries, self.settings.clips_per_batch)
        return self._loader(dataset, StepSampler(len(dataset)) if len(dataset) else None)

    def _loader(self, dataset: Dataset[ClipBatch], sampler: StepSampler | None) -> DataLoader[ClipBatch]:
        workers = self.settings.workers
        return StepLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            prefetch_factor=4 if workers else None,
        )

    # Lightning's hooks

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if not isinstance(batch, ClipBatch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        self.lost.extend(batch.lost)
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
        return {
            "seed": self.seed,
            "global batch": self.plan.global_batch * self.accumulate,
            "data.clip_frames": self.settings.clip_frames,
            "training segments (hash)": self._segments_hash,
        }

    @cached_property
    def _stated(self) -> list[dict[str, dict[str, str]]]:
        """What each folder's `index.json` says of its data sets; shards from elsewhere may have none."""
        stated = []
        for folder in self.settings.shards:
            try:
                stated.append(dict(json.loads((folder / JSON).read_text()).get("datasets", {})))
            except (OSError, ValueError, AttributeError, TypeError):
                stated.append({})
        return stated

    @cached_property
    def _segments_hash(self) -> str:
        digest = hashlib.sha256()
        for source in self.plan.sources:
            digest.update("\n".join(self.catalogs[source.folder].texts("key", source.rows)).encode())
        return digest.hexdigest()[:16]


def _as_is(batch: Any) -> Any:
    return batch
