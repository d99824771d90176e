from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from medsam2.data.augment.augment import Augment, AugmentedBatch
from medsam2.data.batch import ClipBatch
from medsam2.data.datamodule import SEQUENCE_SETTINGS, ClipDataModule
from medsam2.data.plan.plan import Plan, validation_entries
from medsam2.data.read.reader import FixedDataset, StepDataset
from medsam2.data.settings import AugmentSettings, DataSettings
from medsam2.errors import UserError
from medsam2.training.run_folder.resume import StepClock


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
    whole, ranks = StepDataset(plan), [StepDataset(plan, rank, 2) for rank in range(2)]
    accumulated = StepDataset(plan, accumulate=2)
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
    entries = validation_entries(module.catalogs, module.settings, 64)
    parts = [FixedDataset(module.catalogs, entries[rank::world], 4) for rank in range(world)]
    seeds = [seed for part in parts for i in range(len(part)) for seed in part[i].seeds.tolist()]
    assert sorted(seeds) == sorted(entry.seed for entry in entries) and len(seeds) == 6


def test_hashes_and_shares_describe_the_training_split(shards: Path) -> None:
    module = ClipDataModule(settings(shards))
    hashes = module.content_hashes()
    assert hashes == sorted(hashes) and len(hashes) == 14 and "hash-ct-c40" not in hashes
    assert sum(row.share for row in module.expected_shares()) == pytest.approx(1.0)


def test_source_and_licence_of_the_training_data_are_those_that_the_shards_state(shards: Path, tmp_path: Path) -> None:
    statements = [
        {"ct": {"source": "a", "licence": "CC0", "layout": "nnunet"}, "val only": {"source": "b"}},
        {"ct": {"source": "c", "licence": "CC0"}},
        None,
    ]
    folders = [tmp_path / f"shards{number}" for number in range(3)]
    for folder, datasets in zip(folders, statements, strict=True):
        shutil.copytree(shards, folder)
        (folder / "index.json").write_text(json.dumps({"datasets": datasets}) if datasets else "{")
    module = ClipDataModule(settings(shards).model_copy(update={"shards": tuple(folders)}))
    assert module.provenance() == {
        "ct": {"source": "a; c", "licence": "CC0"},
        "us": {"source": "", "licence": ""},
    }


class Recorder(pl.LightningModule):
    """One weight; remembers the step and seeds of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.inputs: list[tuple[int, tuple[int, ...]]] = []
        self.validated: list[str] = []

    def training_step(self, batch: AugmentedBatch, index: int) -> torch.Tensor:
        self.inputs.append((batch.step, tuple(batch.seeds.tolist())))
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
        callbacks=[StepClock()],
        **options,
    )


class Validated(ClipDataModule):
    """Clips for validation as well."""

    def val_dataloader(self) -> Any:
        entries = validation_entries(self.catalogs, self.settings, 64)
        return DataLoader(FixedDataset(self.catalogs, entries, 4), batch_size=None, collate_fn=lambda batch: batch)


def data(shards: Path, seed: int = 0, accumulate: int = 1, **changes: Any) -> ClipDataModule:
    return ClipDataModule(settings(shards, **changes), seed, Augment(AugmentSettings(), 32), accumulate)


@pytest.mark.parametrize(
    ("stop", "before", "after", "workers"),
    [(1, 1, 1, 0), (3, 2, 2, 0), (5, 1, 1, 2), (6, 1, 1, 0), (6, 2, 2, 0), (3, 1, 2, 0), (6, 2, 1, 0), (7, 4, 2, 0)],
)
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_stopped_and_resumed_sees_the_same_batches_in_the_same_order(
    shards: Path, tmp_path: Path, stop: int, before: int, after: int, workers: int
) -> None:
    """Stops after `stop` optimiser steps, 1 .. 7 of 14; an epoch is 6. The accumulation may change on the way."""

    def run(steps: int, accumulate: int, **options: Any) -> tuple[pl.Trainer, list[tuple[int, tuple[int, ...]]]]:
        module = Recorder()
        run_trainer = trainer(steps, accumulate_grad_batches=accumulate)
        clips = data(shards, accumulate=accumulate, workers=workers, clips_per_batch=8 // accumulate)
        run_trainer.fit(module, clips, **options)
        batches: dict[int, list[int]] = {}
        for step, seeds in module.inputs:
            batches.setdefault(step, []).extend(seeds)
        assert [step for step, _ in module.inputs] == [step for step in batches for _ in range(accumulate)]
        return run_trainer, [(step, tuple(seeds)) for step, seeds in batches.items()]

    _, whole = run(14, before)
    assert [step for step, _ in whole] == list(range(14))
    half, first = run(stop, before)
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest, second = run(14, after, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert first + second == whole
    assert rest.global_step == 14


@pytest.mark.filterwarnings("ignore")
def test_validation_batches_arrive_without_augmentation(shards: Path) -> None:
    module = Recorder()
    trainer(6).fit(module, Validated(settings(shards), 0, Augment(AugmentSettings(), 32)))
    assert len(module.validated) == 6


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"clips_per_batch": 2}, "global batch"),
        ({"include": ["lesion"]}, "data.include"),
        ({"mixture": {"*": 1}}, "data.mixture"),
        ({"workers": 3, "steps_per_epoch": 7}, None),
    ],
)
def test_a_resumed_run_refuses_another_seed_batch_or_choice_and_names_it(
    shards: Path, changes: dict[str, Any], field: str | None
) -> None:
    state = data(shards).state_dict()
    other = data(shards, **changes)
    if field is None:
        other.load_state_dict(state)  # the order is the same: allowed
        return
    with pytest.raises(UserError, match=f"{field} was .* and is now"):
        other.load_state_dict(state)


def test_other_segments_are_refused(shards: Path) -> None:
    with pytest.raises(UserError, match="training segments"):
        data(shards, limit_cases=3).load_state_dict(data(shards).state_dict())


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder of shards"):
        ClipDataModule(settings(tmp_path / "nowhere")).train_dataloader()


def test_every_setting_is_known_to_change_the_order_or_not_to() -> None:
    """A new setting must be put on one side."""
    harmless = {"shards", "split", "val_split", "clips_per_batch", "steps_per_epoch", "limit_cases"}
    harmless |= {"workers", "max_lost_share"}  # batch and segments are compared by themselves
    assert set(DataSettings.model_fields) == harmless | set(SEQUENCE_SETTINGS)


# Stills and clips in one run


def mixed_settings(folder: Path, **changes: Any) -> DataSettings:
    stills = {"share": 0.5, "clips_per_batch": 12, "max_objects": 1}
    return settings(folder, stills=stills, **changes)


@pytest.fixture(scope="module")
def mixed(write_shards: Any, disks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [disks(seed) for seed in range(7)] + [disks(seed, 1, modality="XRAY") for seed in range(30, 36)]
    folder: Path = write_shards(tmp_path_factory.mktemp("mixed") / "mixed", samples)
    return folder


def test_batches_of_stills_and_clips_alternate(mixed: Path) -> None:
    batches = list(ClipDataModule(mixed_settings(mixed)).train_dataloader())
    shapes = [tuple(batch.frames.shape[:2]) for batch in batches]
    assert sorted(shapes) == [(4, 3)] * 3 + [(12, 1)] * 3
    assert all(batch.num_objects == 12 for batch in batches if len(batch.keys) == 12)


def test_accumulated_parts_of_a_step_are_of_one_kind(mixed: Path) -> None:
    module = ClipDataModule(mixed_settings(mixed), accumulate=2)
    kinds = [(batch.step, batch.frames.shape[1]) for batch in module.train_dataloader()]
    assert len(kinds) == 12 and len(set(kinds)) == 6


def test_the_frame_that_is_prompted_comes_with_the_batch(shards: Path) -> None:
    module = ClipDataModule(settings(shards, prompt_frame="any"))
    batches = list(module.train_dataloader())
    assert [batch.prompt_frame for batch in batches] == [module.plan.prompt_frame(step) for step in range(6)]
    assert len({batch.prompt_frame for batch in batches}) > 1
    for batch in batches:
        assert batch.masks[:, batch.prompt_frame].flatten(1).any(1).all()


# Damage


def test_the_datamodule_counts_what_is_lost(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "cut")
    module = ClipDataModule(settings(tmp_path / "cut", steps_per_epoch=50))
    where = module.catalogs[0].location(3)
    with open(tmp_path / "cut" / where.shard, "r+b") as file:
        for offset in where.frame_offset.tolist():
            file.seek(offset)
            file.write(b"damaged")
    with pytest.raises(UserError, match="max_lost_share"):
        for batch in module.train_dataloader():
            module.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert module.damage_budget.total > 5
