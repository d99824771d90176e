"""Training clips and validation cases behind one datamodule."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from medsam2.data.datamodule import ClipDataModule
from medsam2.evaluation.quick import LoadedCase, load_cases
from medsam2.training.settings import TrainSettings


class CaseDataset(Dataset[LoadedCase]):
    """This rank's share of the validation cases, held in memory (they are few, and used again and again)."""

    def __init__(self, cases: list[LoadedCase]) -> None:
        self.cases = cases

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> LoadedCase:
        return self.cases[index]


class TrainingData(ClipDataModule):
    """Clips of the train split for training, whole cases of the val split for validation."""

    def __init__(self, settings: TrainSettings, image_size: int) -> None:
        super().__init__(settings.data, settings.seed, settings.augment, image_size, settings.trainer.accumulate)
        self.validation = settings.validation

    def val_dataloader(self) -> DataLoader[Any]:
        """At most `validation.cases` whole cases of each data set, each on exactly one rank."""
        cases: list[LoadedCase] = []
        if self.validation.cases:
            for folder in self.settings.shards:
                cases += load_cases(folder, self.settings.val_split, self.validation.cases)
        return DataLoader(CaseDataset(cases[self.rank :: self.world]), batch_size=None, collate_fn=lambda case: case)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if isinstance(batch, LoadedCase):  # the predictor moves frames as it streams them
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)
