"""SIGKILL at the moments that matter: while saving, between saving and logging, in a validation."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import ROOT, SMALLEST, column
from signalled import forked
from small_shards import build

from medsam2.config import compose
from medsam2.training.fit import fit
from medsam2.training.run_folder.checkpoints import AtomicCheckpointIO, sweep

STEPS = ("trainer.max_steps=4", "trainer.checkpoint_every=3", "trainer.val_every=2", "validation.clips=2")
# step 2 is validated (and saved for that), 3 saved, 4 the last, saved and validated; number: trainer.global_step
KILLS = ("saved:2", "validation:2", "save:3", "validation:4")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSAM2_SALT", "salt of the tests")
        return build(tmp_path_factory.mktemp("killed") / "shards")


def run(shards: Path, output: Path) -> int:
    own = (f"data.shards={shards}", f"output={output}", "module=signalled.Killed", "trainer.progress=none")
    words = [*SMALLEST, *STEPS, *own, "resume=auto"]
    return forked(lambda: fit(compose("train", words)))


@pytest.mark.slow
def test_no_row_and_no_validation_is_lost_by_kills_between_a_step_its_row_and_its_validation(
    shards: Path, tmp_path: Path
) -> None:
    """The last kill is in the last validation: all steps are done, and what belongs to the end is still to come."""
    assert run(shards, tmp_path / "whole") == 0
    tmp_path.joinpath("run.kills").write_text("\n".join(KILLS))
    statuses = [run(shards, tmp_path / "run") for _ in range(len(KILLS) + 1)]
    assert statuses == [-signal.SIGKILL] * len(KILLS) + [0]
    for name in ("train/loss", "train/grad_norm", "val/loss", "lr-AdamW/pg1"):
        assert column(tmp_path / "run", name) == column(tmp_path / "whole", name), name
    assert list(column(tmp_path / "run", "val/loss")) == [1, 3]
    best = [torch.load(tmp_path / run / "checkpoints" / "best.ckpt", weights_only=True) for run in ("run", "whole")]
    assert best[0]["global_step"] == best[1]["global_step"]
    assert (tmp_path / "run" / "events.csv").read_text().rstrip().endswith("finished")


SAVING = """
import sys, torch
from pathlib import Path
from medsam2.training.run_folder.checkpoints import AtomicCheckpointIO
path = Path(sys.argv[1])
writer = AtomicCheckpointIO()
writer.save_checkpoint({"global_step": 1, "weights": torch.zeros(100)}, path)
print("saved", flush=True)
writer.save_checkpoint({"global_step": 2, "weights": torch.zeros(400_000_000)}, path)
"""


def test_a_kill_while_the_temporary_file_grows_leaves_the_checkpoint_before_whole(tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    process = subprocess.Popen([sys.executable, "-c", SAVING, str(path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == b"saved\n"
    end = time.monotonic() + 60
    while not any(part.stat().st_size > 1_000_000 for part in path.parent.glob(".*.partial")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert torch.load(path, weights_only=True)["global_step"] == 1
    (left,) = path.parent.glob(".*.partial")
    sweep(tmp_path / "run")
    assert not left.exists() and path.exists()


def test_tmpdir_is_not_used_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another file system a file cannot be renamed from there in one step."""
    elsewhere = tmp_path / "nowhere"
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, tmp_path / "run" / "last.ckpt")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["last.ckpt"] and not elsewhere.exists()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_hundred_kills_at_random_moments_change_no_figure(tmp_path: Path) -> None:
    """The log is kept where `MEDSAM2_KILLS_LOG` says."""
    words = [sys.executable, str(ROOT / "tests" / "kill_loop.py"), str(tmp_path / "loop")]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if "MEDSAM2_KILLS_LOG" in os.environ:
        shutil.copy(tmp_path / "loop" / "kills.log", os.environ["MEDSAM2_KILLS_LOG"])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert '"kills": 100' in done.stdout
