"""`seed=` and `deterministic=true` give bit-identical runs on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ranks import SMALLEST

from medsam2.config import compose
from medsam2.training.fit import fit
from medsam2.training.loggers.csv_log import read_metrics

MEASURED = ("train/clips_per_second", "train/data_wait", "train/memory_gb")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def run(shards: Path, folder: Path, *more: str) -> Path:
    """Four steps with corrections, all kinds of prompt, augmentation, the average of the weights and a validation."""
    own = (f"data.shards={shards}", f"output={folder}", "trainer.progress=none", "trainer.max_steps=4", "ema=0.9",
           "trainer.val_every=4", "validation.cases=1", "validation.clips=1", "prompts.correction_probability=0.5",
           "prompts.kinds.mask=0.3", "deterministic=true")  # fmt: skip
    return fit(compose("train", [*SMALLEST, *own, *more]))


def figures(folder: Path) -> dict[int, dict[str, float]]:
    rows = read_metrics(folder / "metrics.csv")
    return {step: {k: v for k, v in row.items() if k not in MEASURED} for step, row in rows.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_bit_for_bit_and_another_one_does_not(
    phantom_shards: Path, tmp_path: Path
) -> None:
    one = run(phantom_shards, tmp_path / "one")
    assert torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(99)  # what was drawn before does not matter, and neither does who loads
    two = run(phantom_shards, tmp_path / "two", "data.workers=1")
    assert figures(one) == figures(two) and len(figures(one)) == 4
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for name in ("validation.csv", "pictures/pictures.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    other = run(phantom_shards, tmp_path / "other", "seed=4", "trainer.max_steps=1", "validation.cases=0",
                "validation.clips=0")  # fmt: skip
    assert figures(other)[0]["train/loss"] != figures(one)[0]["train/loss"]
