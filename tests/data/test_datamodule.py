from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from medsam2.data.augment import AugmentedBatch
from medsam2.data.augment_settings import AugmentSettings
from medsam2.data.batch import ClipBatch
from medsam2.data.datamodule import ClipDataModule, FixedDataset, StepDataset
from medsam2.data.plan import Plan, validation_entries
from medsam2.data.settings import DataSettings
from medsam2.errors import UserError


def settings(shards: Path, **changes: Any) -> DataSettings:
    base = {"shards": shards, "clip_frames": 3, "clips_per_batch": 4, "steps_per_epoch": 6, "workers": 0}
    return DataSettings.model_validate({**base, **changes})


def same(first: ClipBatch, second: ClipBatch) -> bool:
    tensors = ("frames", "masks", "sizes", "object_to_clip", "seeds")
    equal = all(torch.equal(getattr(first, name), getattr(second, name)) for name in tensors)
    return equal and (first.step, first.names, first.keys) == (second.step, second.names, second.keys)


def test_workers_change_nothing(shards: Path) -> None:
    alone = list(ClipDataModule(settings(shards)).train_dataloader())
    helped = list(ClipDataModule(settings(shards, workers=2)).train_dataloader())
    assert len(alone) == len(helped) == 6
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_two_ranks_or_two_accumulated_steps_are_one_global_batch(shards: Path) -> None:
    plan = Plan(ClipDataModule(settings(shards)).catalogs, settings(shards), 0, 8)
    half = Plan(plan.catalogs, plan.settings, 0, 4)
    whole, ranks = StepDataset(plan), [StepDataset(plan, rank, 2) for rank in range(2)]
    accumulated = StepDataset(half, accumulate=2)
    for step in (0, 5):
        keys = whole[step].keys
        assert ranks[0][step].keys + ranks[1][step].keys == keys
        halves = [accumulated[2 * step], accumulated[2 * step + 1]]
        assert halves[0].keys + halves[1].keys == keys
        assert {batch.step for batch in halves} == {step}


def test_the_batch_can_be_moved_and_knows_its_objects(shards: Path) -> None:
    batch = next(iter(ClipDataModule(settings(shards)).train_dataloader()))
    assert batch.num_objects == len(batch.names) == len(batch.object_seeds)
    assert same(batch.to("cpu"), batch)
    assert batch.masks[:, 0].flatten(1).any(1).all()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_validation_clip_is_read_exactly_once_over_all_ranks(shards: Path, world: int) -> None:
    module = ClipDataModule(settings(shards))
    entries = validation_entries(module.catalogs, module.settings)
    parts = [FixedDataset(module.catalogs, entries[rank::world], 4) for rank in range(world)]
    seeds = [seed for part in parts for i in range(len(part)) for seed in part[i].seeds.tolist()]
    assert sorted(seeds) == sorted(entry.seed for entry in entries) and len(seeds) == 6


def test_a_data_set_without_validation_has_no_validation_clips(shards: Path) -> None:
    assert len(list(ClipDataModule(settings(shards, val_split="none")).val_dataloader())) == 0


def test_hashes_shares_and_statistics_describe_the_training_split(shards: Path) -> None:
    module = ClipDataModule(settings(shards))
    hashes = module.content_hashes()
    assert hashes == sorted(hashes) and len(hashes) == 14 and "hash-ct-c40" not in hashes
    assert sum(row.share for row in module.expected_shares()) == pytest.approx(1.0)
    ct, us = module.statistics()
    assert (ct["segments"], ct["cases"], ct["frames"]) == (9, 9, 108)
    assert us["objects"] == {"lesion": 5, "organ": 5}


def test_source_and_licence_of_the_training_data_are_those_that_the_shards_state(shards: Path, tmp_path: Path) -> None:
    said = [
        {"ct": {"source": "a", "licence": "CC0", "layout": "nnunet"}, "val only": {"source": "b"}},
        {"ct": {"source": "c", "licence": "CC0"}},
        None,
    ]
    folders = [tmp_path / f"shards{number}" for number in range(3)]
    for folder, datasets in zip(folders, said, strict=True):
        shutil.copytree(shards, folder)
        (folder / "index.json").write_text(json.dumps({"datasets": datasets}) if datasets else "{")
    module = ClipDataModule(settings(shards).model_copy(update={"shards": tuple(folders)}))
    assert module.provenance() == {
        "ct": {"source": "a; c", "licence": "CC0"},
        "us": {"source": "", "licence": ""},
    }


class Recorder(pl.LightningModule):
    """One weight; remembers the step and seeds of what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, tuple[int, ...]]] = []
        self.validated: list[str] = []

    def training_step(self, batch: AugmentedBatch, index: int) -> torch.Tensor:
        self.seen.append((batch.step, tuple(batch.seeds.tolist())))
        return self.weight * batch.frames.mean()

    def validation_step(self, batch: AugmentedBatch, index: int) -> None:
        assert isinstance(batch, AugmentedBatch)
        self.validated.extend(batch.keys)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(steps: int, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def data(shards: Path, seed: int = 0, **changes: Any) -> ClipDataModule:
    return ClipDataModule(settings(shards, **changes), seed, AugmentSettings(), 32)


@pytest.mark.parametrize(("stop", "accumulate", "workers"), [(1, 1, 0), (4, 2, 0), (6, 1, 0), (9, 1, 2), (12, 2, 0)])
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_stopped_and_resumed_sees_the_same_batches_in_the_same_order(
    shards: Path, tmp_path: Path, stop: int, accumulate: int, workers: int
) -> None:
    """Stops after `stop` loader steps; an epoch is 6 optimiser steps, the run 14."""
    whole = Recorder()
    trainer(14, accumulate_grad_batches=accumulate).fit(whole, data(shards))
    assert [step for step, _ in whole.seen] == [i // accumulate for i in range(14 * accumulate)]

    first = Recorder()
    half = trainer(stop // accumulate, accumulate_grad_batches=accumulate)
    half.fit(first, data(shards, workers=workers))
    half.save_checkpoint(tmp_path / "half.ckpt")
    second = Recorder()
    rest = trainer(14, accumulate_grad_batches=accumulate)
    rest.fit(second, data(shards, workers=workers), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert first.seen + second.seen == whole.seen
    assert rest.global_step == 14


@pytest.mark.filterwarnings("ignore")
def test_validation_batches_arrive_without_augmentation(shards: Path) -> None:
    module = Recorder()
    trainer(6).fit(module, data(shards))
    assert len(module.validated) == 6


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"seed": 1}, "seed"), ({"clips_per_batch": 2}, "global batch"), ({"include": ["lesion"]}, None)],
)
def test_a_resumed_run_refuses_another_seed_or_batch_and_names_it(
    shards: Path, changes: dict[str, Any], field: str | None
) -> None:
    state = data(shards).state_dict()
    other = data(shards, **changes)
    if field is None:
        other.load_state_dict(state)  # the same segments: allowed
        return
    with pytest.raises(UserError, match=f"{field} was .* and is now"):
        other.load_state_dict(state)


def test_other_segments_are_refused(shards: Path) -> None:
    with pytest.raises(UserError, match="training segments"):
        data(shards, limit_cases=3).load_state_dict(data(shards).state_dict())


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder of shards"):
        ClipDataModule(settings(tmp_path / "nowhere")).train_dataloader()
