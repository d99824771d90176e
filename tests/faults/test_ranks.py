"""The same clips in the same order on any number of ranks, no hang, and clear ends."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ranks import SMALLEST, TWO_RANKS, clips, column, finish, losses, start, train
from ranks import alone as nothing_is_left
from small_shards import SCANS, build

from medsam2.config import compose
from medsam2.data.datamodule import ClipDataModule
from medsam2.data.settings import DataSettings
from medsam2.errors import UserError
from medsam2.training.fit import fit

GLOBAL, EPOCH, STEPS = 8, 6, 9
Batches = list[list[Any]]  # of each optimiser step, its clips in order


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSAM2_SALT", "salt of the tests")
        return build(tmp_path_factory.mktemp("ranks") / "shards")


def data(shards: Path, first: int, last: int, rank: int, ranks: int, accumulate: int, workers: int) -> ClipDataModule:
    """The datamodule of one rank of a run that goes on at step `first` and ends before `last`."""
    settings = DataSettings(
        shards=(shards,), clip_frames=2, max_objects=1, clips_per_batch=GLOBAL // (ranks * accumulate),
        steps_per_epoch=EPOCH, workers=workers,
    )  # fmt: skip
    module = ClipDataModule(settings, 3, accumulate=accumulate)
    module.trainer = SimpleNamespace(  # type: ignore[assignment]  # what the datamodule asks of a trainer
        global_step=first, max_steps=last, world_size=ranks, global_rank=rank, training=True
    )
    return module


def delivered(
    shards: Path, first: int = 0, last: int = STEPS, ranks: int = 1, accumulate: int = 1, workers: int = 0
) -> Batches:
    """The global batches of steps `first` to `last` - 1 as the train loaders of all ranks deliver them, in order."""
    loaders = [data(shards, first, last, rank, ranks, accumulate, workers).train_dataloader() for rank in range(ranks)]
    batches: Batches = [[] for _ in range(last - first)]
    for number, parts in enumerate(zip(*loaders, strict=True)):
        assert {part.step for part in parts} == {first + number // accumulate}
        for part in parts:
            batches[number // accumulate] += clips(part)
    return batches


@pytest.fixture(scope="module")
def whole(shards: Path) -> Batches:
    """One rank, no worker, no stop; over the end of an epoch."""
    batches = delivered(shards)
    assert len(batches) == STEPS and all(len(batch) == GLOBAL for batch in batches)
    assert len({seed for batch in batches for _, seed, _, _ in batch}) == STEPS * GLOBAL
    return batches


@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (8, 1), (1, 2), (2, 4)])
def test_any_split_of_the_global_batch_delivers_the_same_clips_in_the_same_order(
    shards: Path, whole: Batches, ranks: int, accumulate: int
) -> None:
    assert delivered(shards, ranks=ranks, accumulate=accumulate) == whole


@pytest.mark.filterwarnings("ignore:.*worker processes.*")
@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 3), (2, 3)])
def test_workers_change_neither_clips_nor_order(shards: Path, whole: Batches, ranks: int, workers: int) -> None:
    assert delivered(shards, ranks=ranks, workers=workers) == whole


@pytest.mark.parametrize("stop", [0, 1, EPOCH // 2, EPOCH - 1, EPOCH])
def test_a_run_that_moves_between_two_ranks_and_one_sees_the_same_batches(
    shards: Path, whole: Batches, stop: int
) -> None:
    """2 ranks until `stop`, 1 rank that accumulates for two steps, then 2 ranks again."""
    legs = [(0, stop, 2, 1), (stop, stop + 2, 1, 2), (stop + 2, STEPS, 2, 1)]
    seen = [batch for first, last, ranks, more in legs for batch in delivered(shards, first, last, ranks, more)]
    assert seen == whole


def test_eight_ranks_on_one_shard_have_as_many_batches_each(tmp_path: Path) -> None:
    single = build(tmp_path / "single", SCANS[:1])
    counts = [len(list(data(single, 0, 3, rank, 8, 1, 0).train_dataloader())) for rank in range(8)]
    assert counts == [3] * 8 and delivered(single, last=3, ranks=8) == delivered(single, last=3)


def recorded(folder: Path, ranks: Sequence[int]) -> Batches:
    """Key, seed and names of the clips of each optimiser step of a run that `ranks.Recording` watched."""
    texts = [(folder / f"batches-{rank}.jsonl").read_text() for rank in ranks]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    steps: dict[int, list[Any]] = {}
    # within a step: accumulated batch by accumulated batch, and in each rank by rank
    number: dict[tuple[int, int], int] = {}
    placed = []
    for step, rank, found in rows:
        number[step, rank] = number.get((step, rank), -1) + 1
        placed.append((step, number[step, rank], rank, found))
    for step, _, _, found in sorted(placed, key=lambda row: row[:3]):
        steps.setdefault(step, []).extend(found)
    assert list(steps) == sorted(steps)
    return list(steps.values())


@pytest.mark.slow
def test_a_real_run_that_moves_from_two_ranks_to_one_and_back_trains_on_the_same_batches(
    shards: Path, tmp_path: Path
) -> None:
    """Two steps on two gloo ranks, two on one that accumulates, two on two again: no leg ends where one is due."""
    seen: Batches = []
    for last, ranks in ((2, 2), (4, 1), (6, 2)):
        more = ["trainer.accumulate=2", "data.clips_per_batch=1"] if ranks == 1 else []
        more += ["module=ranks.Recording", f"trainer.max_steps={last}", "resume=auto"]
        train(shards, tmp_path / "run", ranks, *more)
        seen += recorded(tmp_path / "run", range(ranks))
        for path in (tmp_path / "run").glob("batches-*.jsonl"):
            path.unlink()
    settings = DataSettings(shards=(shards,), clip_frames=2, max_objects=1, clips_per_batch=2, min_pixels=24,
                            temperature=0.0, workers=0, steps_per_epoch=6)  # fmt: skip
    expected = [clips(batch) for batch in ClipDataModule(settings, 3).train_dataloader()]
    assert [[clip[:3] for clip in batch] for batch in seen] == [[clip[:3] for clip in batch] for batch in expected]
    assert list(losses(tmp_path / "run")) == list(range(6))


@pytest.mark.slow
def test_a_segment_that_is_damaged_for_one_rank_alone_stops_none(tmp_path: Path) -> None:
    """One shard for two ranks, too."""
    folder = build(tmp_path / "shards", SCANS[:2])
    settings = DataSettings(shards=(folder,), clip_frames=2, max_objects=1, clips_per_batch=2, min_pixels=24,
                            temperature=0.0)  # fmt: skip
    plan = ClipDataModule(settings, 3).plan
    mine, other = plan.batch(0)  # of ranks 1 and 0
    entry = other if other.row != mine.row else mine
    location = plan.catalogs[0].location(entry.row)
    with open(folder / location.shard, "r+b") as file:
        for offset, length in zip(location.frame_offset, location.frame_length, strict=True):
            file.seek(int(offset))
            file.write(bytes(int(length)))
    done = train(folder, tmp_path / "run", 2, "trainer.max_steps=3", "data.max_lost_share=1")
    assert list(losses(tmp_path / "run")) == [0, 1, 2]
    assert float(column(tmp_path / "run", "data/lost")[2]) >= 1
    assert location.key in done.stderr + done.stdout


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_of_them_with_its_message(shards: Path, tmp_path: Path) -> None:
    run = start(shards, tmp_path / "run", 2, "module=ranks.FailingRank", "trainer.max_steps=50")
    done = finish(run)
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("error: the disk of rank 1 is gone") == 1
    assert nothing_is_left(run)


@pytest.fixture(scope="module")
def begun(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on two ranks, which is printed once."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    done = train(shards, folder, 2, "trainer.max_steps=3")
    assert done.stdout.count("Trainable parameters") == 1 and done.stdout.count("step 3/3") == 1
    assert "Initializing distributed" not in done.stdout + done.stderr and "warn" not in done.stderr.lower()
    return folder


@pytest.mark.slow
def test_another_seed_on_two_ranks_gives_one_message_and_leaves_nothing_behind(shards: Path, begun: Path) -> None:
    run = start(shards, begun, 2, "trainer.max_steps=6", "resume=auto", "seed=4")
    done = finish(run)
    assert done.returncode == 2 and nothing_is_left(run)
    assert done.stderr.count("seed was 3 and is now 4") == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("field", ["seed", "global batch", "training segments"])
def test_a_run_of_two_ranks_is_not_gone_on_with_under_another_seed_batch_or_data(
    shards: Path, begun: Path, tmp_path: Path, field: str
) -> None:
    changed = {
        "seed": "seed=4",
        "global batch": "data.clips_per_batch=2",
        "training segments": f"data.shards={build(tmp_path / 'other', SCANS[:3])}",
    }
    given = [*SMALLEST, *TWO_RANKS, f"data.shards={shards}", f"output={begun}", "resume=auto", changed[field]]
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"cannot resume: {field}.* was .* and is now"):
        fit(compose("train", given))
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before
