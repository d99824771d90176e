"""Runs of train.py on one or several gloo ranks, as small as they can be, and modules that watch or disturb them."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medsam2.data.augment.augment import AugmentedBatch
from medsam2.data.batch import ClipBatch
from medsam2.errors import UserError
from medsam2.model.build import LoadedModel
from medsam2.training.module import FineTuner
from medsam2.training.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[1]
SMALLEST = (
    "experiment=quickstart", "start=random", "seed=3", "ema=null", "trainer.max_steps=8", "trainer.checkpoint_every=3",
    "trainer.val_every=8", "trainer.log_every=1", "trainer.threads=1", "data.clips_per_batch=2", "data.clip_frames=2",
    "data.max_objects=1", "data.workers=0", "prompts.correction_probability=0", "validation.cases=0",
)  # fmt: skip
TWO_RANKS = ("trainer.devices=2", "trainer.strategy=ddp_find_unused_parameters_true", "data.clips_per_batch=1")
LIMIT = 120.0  # seconds; a run takes ten on an idle machine


def command(shards: Path, output: Path, ranks: int, *more: str) -> list[str]:
    """The command line of a run whose global batch is two clips, whatever the number of ranks."""
    own = (f"data.shards={shards}", f"output={output}", *(TWO_RANKS if ranks == 2 else ()))
    return [sys.executable, str(ROOT / "train.py"), *SMALLEST, *own, *more]


def start(shards: Path, output: Path, ranks: int, *more: str) -> subprocess.Popen[str]:
    """Start a run in a process group of its own."""
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160", "PYTHONPATH": paths}
    return subprocess.Popen(
        command(shards, output, ranks, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, start_new_session=True,
    )  # fmt: skip


def finish(run: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a run; one that hangs is killed, with all its ranks, and fails the test."""
    try:
        output, errors = run.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        output, errors = run.communicate()
        raise AssertionError(f"the run hangs: {output[-2000:]} {errors[-3000:]}") from None
    return subprocess.CompletedProcess(run.args, run.returncode, output, errors)


def train(shards: Path, output: Path, ranks: int, *more: str) -> subprocess.CompletedProcess[str]:
    """A whole run that must succeed and leave no process behind."""
    run = start(shards, output, ranks, *more)
    done = finish(run)
    assert done.returncode == 0, done.stderr[-3000:]
    assert alone(run)
    return done


def alone(run: subprocess.Popen[str], within: float = 5.0) -> bool:
    """Whether no process of the run's group is left."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    return False


def kill_after(run: subprocess.Popen[str], output: Path, step: int, delay: float) -> None:
    """SIGKILL to all ranks and workers of a run that has just started, `delay` seconds after it has logged `step`."""
    before, end = written(output), time.monotonic() + LIMIT
    while time.monotonic() < end and run.poll() is None:
        if written(output) != before and max(losses(output), default=-1) >= step:
            break
        time.sleep(0.01)
    time.sleep(delay)
    assert run.poll() is None, f"the run ended before it could be killed: {run.communicate()}"
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL and alone(run)


def written(output: Path) -> int:
    """When metrics.csv was written last, in nanoseconds; 0 while there is none."""
    path = output / "metrics.csv"
    return path.stat().st_mtime_ns if path.exists() else 0


def column(output: Path, name: str) -> dict[int, str]:
    """The figures of one column of metrics.csv by step, as they are written (full precision)."""
    path = output / "metrics.csv"
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {int(row["step"]): row[name] for row in csv.DictReader(file) if row.get(name)}


def losses(output: Path) -> dict[int, str]:
    return column(output, "train/loss")


def clips(batch: ClipBatch | AugmentedBatch) -> list[list[Any]]:
    """What identifies each clip of a batch: key, seed, names of its objects and, where undisturbed, its pixels."""
    found = []
    for index, key in enumerate(batch.keys):
        own = (batch.object_to_clip == index).nonzero()[:, 0].tolist()
        pixels = ""
        if isinstance(batch, ClipBatch):
            content = batch.frames[index].numpy().tobytes() + batch.masks[own].numpy().tobytes()
            pixels = hashlib.sha256(content).hexdigest()
        found.append([key, int(batch.seeds[index]), [batch.names[place] for place in own], pixels])
    return found


class Recording(FineTuner):
    """Writes which clips each rank gets at each step to `batches-RANK.jsonl` in the run folder."""

    def training_step(self, batch: AugmentedBatch, batch_idx: int) -> Tensor:
        row = [self.trainer.global_step, self.trainer.global_rank, clips(batch)]
        with open(Path(self.settings.output) / f"batches-{self.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        return super().training_step(batch, batch_idx)


class FailingRank(FineTuner):
    """Rank 1 alone meets an error that the user can mend, at its second step."""

    def training_step(self, batch: AugmentedBatch, batch_idx: int) -> Tensor:
        if self.trainer.global_rank == 1 and self.trainer.global_step == 1:
            raise UserError("the disk of rank 1 is gone; put it back.")
        return super().training_step(batch, batch_idx)


class Dropping(FineTuner):
    """A nano model with the dropout that larger ones have in their memory attention."""

    def __init__(self, loaded: LoadedModel, settings: TrainSettings, *more: Any) -> None:
        super().__init__(loaded, settings, *more)
        for module in loaded.sam.memory_attention.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
            if hasattr(module, "dropout_p"):
                module.dropout_p = 0.1

    def on_train_start(self) -> None:
        torch.rand(self.trainer.global_step + 1)  # the generators of a resumed run stand elsewhere
