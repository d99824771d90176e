"""Loss or gradient that is not finite, and memory that ends."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import SMALLEST
from ranks import train as run_ranks

from medsam2.config import compose, validate
from medsam2.errors import UserError
from medsam2.training.fit import fit
from medsam2.training.memory import advice, largest_divisor
from medsam2.training.replay import read_batch, replay
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
def test_a_step_that_is_not_finite_changes_nothing_and_is_dumped(
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

    dumps = sorted(path.name for path in (folder / "bad").iterdir())
    assert dumps == [f"step-{BAD_STEP:06d}-rank-0.safetensors", f"step-{BAD_STEP:06d}-weights.safetensors"]
    batch, said = read_batch(folder / "bad" / dumps[0])
    assert list(batch.keys) == states(folder)[BAD_STEP][3] and batch.step == BAD_STEP
    assert said["plan"]["kind"] in ("mask", "box", "click") and said["seed"] == 3
    assert ("gradient" in said["reason"]) == (fault == "NanGradient")


def test_a_dump_replays_the_loss_of_its_step(phantom_shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The fault was put on top of the loss: computed again from the dump, it is that of the undisturbed run."""
    folder = run(phantom_shards, tmp_path / "run", "NanLoss")
    again = replay(folder / "bad" / f"step-{BAD_STEP:06d}-rank-0.safetensors")
    assert again.loss == pytest.approx(column(undisturbed, "train/loss")[BAD_STEP], rel=1e-6)
    assert again.norm == pytest.approx(column(undisturbed, "train/grad_norm")[BAD_STEP], rel=1e-4)
    assert again.fault == ""


def test_the_run_stops_after_n_bad_steps_in_a_row_and_a_replay_names_the_layer(
    phantom_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"3 steps in a row.*trainer\.max_bad_steps=3.*bad"):
        run(phantom_shards, tmp_path / "run", "BrokenWeight", "trainer.max_bad_steps=3", "trainer.bad_dumps=2")
    folder = tmp_path / "run"
    assert len(states(folder)) == STEPS, "the third bad step is the last one"
    assert len(list((folder / "bad").glob("*-rank-0.safetensors"))) == 2
    found = replay(folder / "bad" / f"step-{BAD_STEP:06d}-rank-0.safetensors")
    assert found.fault == "output of tracker.sam.sam_mask_decoder.transformer.layers.1.mlp.layers.0"


def test_of_accumulated_batches_the_bad_one_is_dumped(phantom_shards: Path, tmp_path: Path) -> None:
    more = ("trainer.accumulate=2", "data.clips_per_batch=1", "trainer.max_steps=4")
    folder = run(phantom_shards, tmp_path / "run", "NanGradient", *more)
    rows = states(folder)
    first, second = (row for row in rows if row[0] == BAD_STEP)
    _, said = read_batch(folder / "bad" / f"step-{BAD_STEP:06d}-rank-0.safetensors")
    assert said["micro"] == 0 and said["keys"] == first[3] != second[3]
    assert first[2] == next(row[2] for row in rows if row[0] == BAD_STEP + 1)
    assert len({row[2] for row in rows}) == 3, "of four steps one changes nothing"


def test_one_rank_of_two_lets_both_skip(phantom_shards: Path, tmp_path: Path) -> None:
    """The loss says whose batch it was; a gradient that was already averaged does not."""
    run_ranks(phantom_shards, tmp_path / "run", 2, "trainer.max_steps=6", "module=faulty.LossThenGradient")
    ours, theirs = ([row[2] for row in states(tmp_path / "run", rank)] for rank in (0, 1))
    assert ours == theirs and len(set(ours)) == 4
    assert ours[BAD_STEP] == ours[BAD_STEP + 1] == ours[BAD_STEP + 2]
    found = sorted((tmp_path / "run" / "bad").glob("*-rank-*"))
    assert [path.stem for path in found] == ["step-000002-rank-1", "step-000003-rank-0", "step-000003-rank-1"]
    saids = [read_batch(path)[1] for path in found]
    assert [said["batch_step"] for said in saids] == [2, 3, 3]
    assert saids[1]["keys"] + saids[2]["keys"] == states(tmp_path / "run", 0)[3][3] + states(tmp_path / "run", 1)[3][3]


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
    assert "more lines" not in text


def test_advice_keeps_the_global_batch_and_ends_where_nothing_is_left() -> None:
    given = ["data.shards=x", "output=y", "data.clips_per_batch=6", "trainer.accumulate=1"]
    first = advice(validate(TrainSettings, compose("train", given)))[0]
    assert "data.clips_per_batch=3 trainer.accumulate=2" in first
    given = ["data.shards=x", "output=y", "data.clips_per_batch=1", "data.max_objects=1", "data.clip_frames=1"]
    small = validate(TrainSettings, compose("train", [*given, "adaptation=decoder", "trainer.precision=bf16-mixed"]))
    assert all("now 1)" not in line for line in advice(small))
    assert largest_divisor(9, 4) == 3 and largest_divisor(7, 6) == 1
