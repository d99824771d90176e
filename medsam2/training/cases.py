"""Training clips, and validation cases and clips, behind one datamodule."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import ConcatDataset, DataLoader

from medsam2.data.augment.augment import Augment
from medsam2.data.batch import ClipBatch
from medsam2.data.datamodule import ClipDataModule
from medsam2.data.plan.plan import validation_entries
from medsam2.data.read.reader import FixedDataset
from medsam2.errors import UserError
from medsam2.evaluation.run.sources import load_cases
from medsam2.training.callbacks.validation import ValidationCase
from medsam2.training.launch.signals import shield_worker
from medsam2.training.retention import add_replay
from medsam2.training.settings import TrainSettings


def start_worker(number: int) -> None:
    """Prepare a process that loads clips: shield it from signals, then seed it."""
    shield_worker()
    pl_worker_init_function(number)


class TrainingData(ClipDataModule):
    """Clips of the train split for training; whole cases and fixed clips of the val split for validation."""

    def __init__(self, settings: TrainSettings, image_size: int) -> None:
        data = add_replay(settings.data, settings.retention)
        super().__init__(data, settings.seed, Augment(settings.augment, image_size), settings.trainer.accumulate)
        self.validation, self.retention = settings.validation, settings.retention

    @cached_property
    def old_datasets(self) -> frozenset[str]:
        """Names of the training datasets that are old knowledge.

        Raises:
            UserError: there is none.
        """
        sources = self.plan.sources
        old = frozenset(s.dataset for s in sources if self.retention.is_old(s.dataset, s.label, s.modality))
        if not old:
            key, patterns = ("old", self.retention.old) if self.retention.old else ("new", self.retention.new)
            names = ", ".join(sorted({source.label for source in sources}))
            raise UserError(f"retention.{key}={list(patterns)} makes no dataset old; there are {names}.")
        return old

    @cached_property
    def _all_cases(self) -> list[ValidationCase]:
        """The validation cases of all ranks: at most `validation.cases` of each data set, then the general ones."""
        split, limit = self.settings.val_split, self.validation.cases
        cases = []
        for catalog in self.catalogs if limit else ():
            for case in load_cases(catalog.store, split, limit):
                old = self.retention.is_old(case.dataset, f"{catalog.name}:{case.dataset}", case.modality)
                cases.append(ValidationCase(case, old))
        for location in self.validation.general:
            cases += [ValidationCase(case, old=True, general=True) for case in load_cases(location, split, limit)]
        return cases

    @property
    def validation_cases(self) -> list[ValidationCase]:
        """This rank's share of the validation cases."""
        return self._all_cases[self.rank :: self.world]

    def train_dataloader(self) -> DataLoader[ClipBatch]:
        loader = super().train_dataloader()
        loader.worker_init_fn = start_worker
        return loader

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Cases, then clips; each on exactly one rank, in a fixed order, and as many batches on every rank.

        At most `validation.cases` whole cases of each data set and at most `validation.clips` clips. A batch holds
        one clip: what a batch shares, such as the kind of prompt, then does not depend on the number of ranks.
        """
        entries = validation_entries(self.catalogs, self.settings, self.validation.clips)
        clips = FixedDataset(self.catalogs, entries[self.rank :: self.world], 1)
        loaders = [self._padded(self.validation_cases, len(self._all_cases)), self._padded(clips, len(entries))]
        return [loader for loader in loaders if len(loader)] or loaders[:1]

    def _padded(self, share: Any, total: int) -> DataLoader[Any]:
        """A loader of this rank's share of `total` items, and None up to the length that it has on every rank.

        Lightning skips the validation of a rank that has no batch, while the others wait for its rows.
        """
        missing = -(-total // self.world) - len(share)
        dataset: ConcatDataset[Any] = ConcatDataset([share, [None] * missing])  # type: ignore[list-item]  # lists
        return DataLoader(dataset, batch_size=None)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if batch is None or isinstance(batch, ValidationCase):  # the predictor moves frames as it streams them
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)
