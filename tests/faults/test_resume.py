"""A run that is killed and goes on gives what an undisturbed one gives, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from ranks import column, kill_after, losses, start, train
from small_shards import build

STEPS = 8
VALIDATED = ("validation.cases=1", "validation.clips=3")
Runs = dict[int, Path]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSAM2_SALT", "salt of the tests")
        return build(tmp_path_factory.mktemp("resume") / "shards")


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The folders of the same run on 1 and on 2 ranks; one validation case and three clips, at the end."""
    folders = {ranks: tmp_path_factory.mktemp("whole") / f"{ranks}" for ranks in (1, 2)}
    for ranks, folder in folders.items():
        train(shards, folder, ranks, *VALIDATED)
        assert list(losses(folder)) == list(range(STEPS))
    return folders


def kill_and_resume(shards: Path, folder: Path, ranks: int, workers: int, seed: int, kills: int, last: int = 0) -> None:
    """Kill a run `kills` times at moments that follow from `seed`, from step `last` on, then let it end."""
    draw = random.Random(seed)
    more = (f"data.workers={workers}", "resume=auto", *VALIDATED)
    for _ in range(kills):
        run = start(shards, folder, ranks, *more)
        last = min(draw.randint(last, last + 3), STEPS - 3)
        kill_after(run, folder, last, draw.uniform(0.0, 0.1))
    train(shards, folder, ranks, *more)


def assert_same(folder: Path, whole: Path) -> None:
    assert losses(folder) == losses(whole)
    for name in ("val/dsc", "val/loss"):
        assert column(folder, name) == column(whole, name) != {}
    ours, theirs = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (folder, whole)
    )
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "workers"),
    [(1, 0), (2, 2), pytest.param(1, 2, marks=pytest.mark.slow), pytest.param(2, 0, marks=pytest.mark.slow)],
)
def test_a_killed_run_goes_on_bit_for_bit(
    shards: Path, undisturbed: Runs, tmp_path: Path, ranks: int, workers: int
) -> None:
    kill_and_resume(shards, tmp_path / "run", ranks, workers, seed=10 * ranks + workers, kills=1, last=3)
    assert_same(tmp_path / "run", undisturbed[ranks])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(25))
def test_many_kills_change_nothing(shards: Path, undisturbed: Runs, tmp_path: Path, seed: int) -> None:
    """100 kills in all: four in each of 25 runs, over ranks and workers."""
    ranks, workers = 1 + seed % 2, 2 * (seed // 2 % 2)
    kill_and_resume(shards, tmp_path / "run", ranks, workers, seed, kills=4)
    assert_same(tmp_path / "run", undisturbed[ranks])


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one_with_a_batch_twice_as_large(undisturbed: Runs) -> None:
    one, two = ([float(loss) for loss in losses(undisturbed[ranks]).values()] for ranks in (1, 2))
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
def test_validation_gives_the_same_figures_on_two_ranks(undisturbed: Runs) -> None:
    """One case and three clips: a rank has no case at all, and one clip less than the other."""
    for name in ("val/dsc", "val/loss"):
        one, two = ([float(text) for text in column(undisturbed[ranks], name).values()] for ranks in (1, 2))
        assert len(one) == 1 and two == pytest.approx(one, rel=1e-3)  # of weights that differ by rounding


@pytest.mark.slow
def test_dropout_of_a_resumed_run_is_that_of_the_undisturbed_one(
    shards: Path, undisturbed: Runs, tmp_path: Path
) -> None:
    folder, more = tmp_path / "run", "module=ranks.Dropping"
    train(shards, folder, 2, more)
    whole = losses(folder)
    assert whole[1] != losses(undisturbed[2])[1]  # it does drop (the frames of step 0 are all prompted)
    last = folder / "checkpoints" / "last.ckpt"
    last.with_name("previous.ckpt").replace(last)
    train(shards, folder, 2, more, "resume=auto")
    assert losses(folder) == whole
