"""Validation's figures do not depend on ranks, and every case and clip counts once."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_shards import SCANS, build

from medsam2.data.batch import ClipBatch
from medsam2.errors import UserError
from medsam2.model.build import LoadedModel, ModelSpec, build_sam
from medsam2.training.callbacks.validation import (
    ScoreRow,
    ValidationCase,
    gather_rows,
    mean_obedience,
    mean_scores,
)
from medsam2.training.cases import TrainingData
from medsam2.training.module import FineTuner
from medsam2.training.retention import RetentionSettings
from medsam2.training.run_folder.checkpoints import checkpoint_callbacks
from medsam2.training.settings import TrainSettings


def settings(shards: Path, **validation: object) -> TrainSettings:
    return TrainSettings.model_validate(
        {
            "data": {"shards": shards, "clip_frames": 2, "workers": 0}, "output": "unused", "start": "random",
            "validation": {"cases": 0, **validation},
        }
    )  # fmt: skip


def data(shards: Path, rank: int = 0, ranks: int = 1, **validation: int) -> TrainingData:
    module = TrainingData(settings(shards, **validation), 128)
    module.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, training=False)  # type: ignore[assignment]
    return module


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return build(tmp_path / "shards")


def items(shards: Path, rank: int, ranks: int, **validation: int) -> list[list[Any]]:
    return [list(loader) for loader in data(shards, rank, ranks, **validation).val_dataloader()]


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_every_case_and_clip_is_on_one_rank_and_all_ranks_have_as_many_batches(shards: Path, ranks: int) -> None:
    """The val split holds one case of two segments, each with one object."""
    parts = [items(shards, rank, ranks, cases=4, clips=9) for rank in range(ranks)]
    assert len({tuple(map(len, part)) for part in parts}) == 1
    cases = [item for part in parts for item in part[0] if item is not None]
    clips = [item for part in parts for item in part[1] if item is not None]
    assert all(isinstance(case, ValidationCase) for case in cases) and all(
        isinstance(clip, ClipBatch) for clip in clips
    )
    whole = items(shards, 0, 1, cases=4, clips=9)
    assert len(cases) == len(whole[0]) and len(clips) == len(whole[1]) == 2
    assert sorted(int(clip.seeds) for clip in clips) == sorted(int(clip.seeds) for clip in whole[1])
    assert all(len(clip.keys) == 1 for clip in clips)


def test_clips_alone_can_be_validated_and_choose_the_best_checkpoint(shards: Path) -> None:
    assert [[type(item) for item in loader] for loader in items(shards, 0, 1, clips=1)] == [[ClipBatch]]
    last, best = checkpoint_callbacks(settings(shards, clips=1))
    assert (best.monitor, best.mode) == ("val/loss", "min")  # type: ignore[attr-defined]
    assert len(checkpoint_callbacks(settings(shards))) == 1


def rows() -> list[ScoreRow]:
    draw = random.Random(0)
    return [
        ScoreRow(protocol, f"d{case % 2}", f"c{case}", number, ("liver", "cyst")[number], draw.random())
        for protocol in ("box", "click")
        for case in range(7)
        for number in range(2)
    ]


def test_means_are_the_same_to_the_last_bit_in_any_order() -> None:
    found = rows()
    means = mean_scores(found)
    assert mean_scores(random.Random(1).sample(found, len(found))) == means
    assert means["val/dsc"] == pytest.approx(sum(row.dsc for row in found) / len(found))
    chosen = [row.dsc for row in found if row.protocol == "box" and row.dataset == "d1"]
    assert means["val/box/d1/dsc"] == pytest.approx(sum(chosen) / len(chosen))
    assert set(means) == {
        "val/dsc", "val/gain", "val/box/dsc", "val/click/dsc", "val/liver/dsc", "val/cyst/dsc",
        *(f"val/{protocol}/d{number}/dsc" for protocol in ("box", "click") for number in (0, 1)),
    }  # fmt: skip


def test_old_data_sets_are_retention_and_general_ones_are_that_alone() -> None:
    """What is general counts neither as the run's own data nor as gain, even under the name of an own data set."""
    found = [
        ScoreRow("box", "new", "a", 0, "wall", 0.5),
        ScoreRow("box", "old", "b", 0, "liver", 0.9, old=True),
        ScoreRow("box", "old", "b", 0, "liver", 0.3, old=True, general=True),
    ]
    means = mean_scores(found)
    assert means["val/gain"] == 0.5 and means["val/retention"] == pytest.approx(0.6)
    assert means["val/dsc"] == pytest.approx(0.7) and means["val/box/old/dsc"] == 0.9


def test_obedience_is_the_share_of_prompts_that_were_obeyed() -> None:
    assert mean_obedience([False, True, True, True]) == {"val/obedience": 0.75}
    assert mean_obedience([]) == {}


@pytest.mark.parametrize("retention", [{"old": ["d"]}, {"new": ["e", "CT"]}, {"old": ["shards:d"]}])
def test_cases_are_old_by_data_set_folder_or_modality_and_general_shards_come_on_top(
    shards: Path, tmp_path: Path, retention: dict[str, list[str]]
) -> None:
    general = build(tmp_path / "general", SCANS[:6])
    update = {"retention": RetentionSettings(**retention)}
    own = settings(shards, cases=4, general=(str(general),)).model_copy(update=update)
    found = TrainingData(own, 128)
    assert [(case.case.dataset, case.old, not case.general) for case in found.validation_cases] == [
        *[("d", True, True)] * 2, *[("d", True, False)] * 2,
    ]  # fmt: skip
    assert found.old_datasets == {"d"}


def test_patterns_that_make_nothing_old_are_refused_with_what_there_is(shards: Path) -> None:
    own = settings(shards).model_copy(update={"retention": RetentionSettings(old=("liver",))})
    message = r"retention\.old=\['liver'\] makes no dataset old; there are shards:d, shards:e"
    with pytest.raises(UserError, match=message):
        assert TrainingData(own, 128).old_datasets


def test_no_rows_give_no_scores() -> None:
    assert mean_scores([]) == {} and gather_rows([2.0]) == [2.0]


def test_the_loss_of_a_fixed_clip_depends_on_nothing_but_clip_and_weights(shards: Path) -> None:
    """Not on the run's seed, its step or the clips that were validated before."""
    spec = ModelSpec("hiera_nano", "2.1", 128)
    torch.manual_seed(0)
    loaded = LoadedModel(build_sam(spec), spec)
    found = []
    for seed, order in ((0, [0, 1]), (5, [1, 0])):
        own = settings(shards, clips=2).model_copy(update={"seed": seed})
        module, source = FineTuner(loaded, own).eval(), data(shards, clips=2)
        batches = [source.on_after_batch_transfer(batch, 0) for batch in source.val_dataloader()[0]]
        with torch.no_grad():
            for number in order:
                module.validation_step(batches[number], number)
        found.append(dict(zip(order, module.clip_losses, strict=True)))
    assert found[0] == found[1] and len(set(found[0].values())) == 2
