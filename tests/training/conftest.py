"""Small shards of generated cases, and a run of train.py as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY_RUN = (
    "experiment=quickstart", "start=random", "seed=3", "trainer.max_steps=6", "trainer.checkpoint_every=3",
    "trainer.val_every=3", "trainer.log_every=1", "trainer.threads=1", "data.clips_per_batch=2", "data.clip_frames=2",
    "data.workers=0", "validation.cases=1",
)  # fmt: skip

Train = Callable[..., subprocess.CompletedProcess[str]]


def run_train(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command = [sys.executable, str(ROOT / "train.py"), *TINY_RUN, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="session")
def tiny_arguments() -> tuple[str, ...]:
    return TINY_RUN


@pytest.fixture(scope="session")
def train() -> Train:
    """Run train.py with `TINY_RUN` and more arguments."""
    return run_train


@pytest.fixture(scope="session")
def phantom_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated CT and endoscopy cases, five of each, prepared; read only."""
    from medsam2.demo.phantoms import write_cases
    from medsam2.shards.prepare.run import PrepareOptions, prepare

    folder = tmp_path_factory.mktemp("training")
    write_cases(folder / "cases", 5, 7, modalities=("CT", "ENDOSCOPY"), workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSAM2_SALT", "salt of the tests")
        prepare(folder / "cases", folder / "shards", PrepareOptions(shares={"train": 0.6, "val": 0.4}))
    return folder / "shards"


@pytest.fixture(scope="session")
def tiny_run(train: Train, phantom_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of six undisturbed steps."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = train(f"data.shards={phantom_shards}", f"output={folder}")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder
