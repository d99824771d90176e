"""Loss or gradient that is not finite, and memory that ends."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import SMALLEST
from ranks import train as run_ranks

from medsam2.config import compose, validate
from medsam2.errors import UserError
from medsam2.training.cases import TrainingData
from medsam2.training.fit import fit
from medsam2.training.launch.limits import advice, largest_divisor
from medsam2.training.settings import TrainSettings

BAD_STEP, STEPS = 2, 5


def run(shards: Path, output: Path, fault: str, *more: str) -> Path:
    steps = (f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=1", "trainer.progress=none")
    own = (f"data.shards={shards}", f"output={output}", f"module=faulty.{fault}")
    return fit(compose("train", [*SMALLEST, *steps, *own, *more]))


def states(folder: Path, rank: int = 0) -> list[list[Any]]:
    """[step, batch, digest of weights and optimiser, keys] at the start of each batch."""
    return [json.loads(line) for line in (folder / f"states-{rank}.jsonl").read_text().splitlines()]


def column(folder: Path, name: str) -> dict[int, float]:
    with open(folder / "metrics.csv", newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


@pytest.fixture(scope="module")
def undisturbed(phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(phantom_shards, tmp_path_factory.mktemp("guard") / "run", "Watched")


@pytest.mark.parametrize("fault", ["NanLoss", "InfiniteLoss", "NanGradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    phantom_shards: Path, undisturbed: Path, tmp_path: Path, fault: str
) -> None:
    folder = run(phantom_shards, tmp_path / "run", fault)
    digests = [row[2] for row in states(folder)]
    assert digests[BAD_STEP] == digests[BAD_STEP + 1]
    assert len(set(digests)) == STEPS - 1, "all other steps change the weights"
    assert digests[: BAD_STEP + 1] == [row[2] for row in states(undisturbed)][: BAD_STEP + 1]
    assert column(folder, "train/skipped")[STEPS - 1] == 1
    assert "train/skipped" not in (undisturbed / "metrics.csv").read_text()
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == STEPS
    assert all(bool(torch.isfinite(value).all()) for value in last["state_dict"].values())


def test_the_run_stops_after_n_bad_steps_in_a_row(phantom_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"3 steps in a row.*trainer\.max_bad_steps=3"):
        run(phantom_shards, tmp_path / "run", "BrokenWeight", "trainer.max_bad_steps=3")
    assert len(states(tmp_path / "run")) == STEPS, "the third bad step is the last one"


def test_the_clips_of_a_skipped_step_are_found_again_from_seed_and_step(
    phantom_shards: Path, undisturbed: Path
) -> None:
    """As docs/how-to/train.md says."""
    settings = validate(TrainSettings, yaml.safe_load((undisturbed / "config.yaml").read_text()))
    plan = TrainingData(settings, settings.model.image_size).plan
    keys = [plan.catalogs[entry.folder].text("key", entry.row) for entry in plan.batch(BAD_STEP)]
    assert keys == states(undisturbed)[BAD_STEP][3]


def test_of_accumulated_batches_one_bad_one_skips_the_step(phantom_shards: Path, tmp_path: Path) -> None:
    more = ("trainer.accumulate=2", "data.clips_per_batch=1", "trainer.max_steps=4")
    rows = states(run(phantom_shards, tmp_path / "run", "NanGradient", *more))
    first = next(row for row in rows if row[0] == BAD_STEP)
    assert first[2] == next(row[2] for row in rows if row[0] == BAD_STEP + 1)
    assert len({row[2] for row in rows}) == 3, "of four steps one changes nothing"


@pytest.mark.slow
def test_one_rank_of_two_lets_both_skip(phantom_shards: Path, tmp_path: Path) -> None:
    """The loss says whose batch it was; a gradient that was already averaged does not."""
    done = run_ranks(phantom_shards, tmp_path / "run", 2, "trainer.max_steps=6", "module=faulty.LossThenGradient")
    ours, theirs = ([row[2] for row in states(tmp_path / "run", rank)] for rank in (0, 1))
    assert ours == theirs and len(set(ours)) == 4
    assert ours[BAD_STEP] == ours[BAD_STEP + 1] == ours[BAD_STEP + 2]
    skipped = re.findall(r"step (\d) is skipped on all ranks: .*? on rank (\d)", done.stdout)
    assert sorted(skipped) == [("2", "1"), ("3", "0"), ("3", "1")], done.stdout


def test_bfloat16_learns_nearly_what_float32_learns(phantom_shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = run(phantom_shards, tmp_path / "run", "Watched", "trainer.precision=bf16-mixed")
    ours, theirs = column(folder, "train/loss"), column(undisturbed, "train/loss")
    assert ours != theirs
    assert ours == pytest.approx(theirs, rel=0.1)


def test_float16_without_a_gpu_is_refused() -> None:
    config = compose("train", [*SMALLEST, "data.shards=x", "output=y", "trainer.precision=16-mixed"])
    with pytest.raises(UserError, match=r"16-mixed needs a GPU.*bf16-mixed"):
        validate(TrainSettings, config)


# ------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("fault", ["Exhausted", "ExhaustedMachine"])
def test_out_of_memory_names_the_settings_and_the_batch(phantom_shards: Path, tmp_path: Path, fault: str) -> None:
    with pytest.raises(UserError) as caught:
        run(phantom_shards, tmp_path / "run", fault, "data.clip_frames=4", "trainer.accumulate=3")
    text = str(caught.value)
    assert text.startswith(f"out of memory at step {BAD_STEP} with a batch of 2 clips of 4 frames of 128 px with 2 obj")
    assert "data.clips_per_batch=1 trainer.accumulate=6 (now 2 and 3)" in text
    assert "model.checkpoint=[image_encoder] (now [])" in text
    assert "data.clip_frames=2 (now 4)" in text and "trainer.precision=bf16-mixed" in text


def test_advice_keeps_the_global_batch_and_ends_where_nothing_is_left() -> None:
    given = ["data.shards=x", "output=y", "data.clips_per_batch=6", "trainer.accumulate=1"]
    first = advice(validate(TrainSettings, compose("train", given)))[0]
    assert "data.clips_per_batch=3 trainer.accumulate=2" in first
    given = ["data.shards=x", "output=y", "data.clips_per_batch=1", "data.max_objects=1", "data.clip_frames=1"]
    small = validate(TrainSettings, compose("train", [*given, "adaptation=decoder", "trainer.precision=bf16-mixed"]))
    assert all("now 1)" not in line for line in advice(small))
    assert largest_divisor(9, 4) == 3 and largest_divisor(7, 6) == 1
