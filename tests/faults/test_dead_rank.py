"""A rank that dies ends the job within a bounded time, with the cause on stderr."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import ROOT, alone, command, finish
from small_shards import build

from medsam2.training.launch import shutdown
from medsam2.training.launch.shutdown import RankEnd, clean_shutdown, end_ranks

DYING = ("module=signalled.DyingRank", "trainer.max_steps=50")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSAM2_SALT", "salt of the tests")
        return build(tmp_path_factory.mktemp("dead") / "shards")


def begin(words: list[str], dies: int, **more: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "MEDSAM2_TEST_DIES": str(dies), **more}
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_though_they_hang(shards: Path, tmp_path: Path) -> None:
    """Rank 0 sleeps in its step, as it would in a collective of NCCL."""
    process = begin(command(shards, tmp_path / "run", 2, *DYING), dies=1, MEDSAM2_TEST_HANGS="1")
    done = finish(process)
    assert done.returncode == 1 and alone(process)
    assert "error: rank 1 (process" in done.stderr and "was ended by SIGKILL" in done.stderr


@pytest.mark.slow
def test_the_others_end_when_rank_0_is_killed_though_they_hang(shards: Path, tmp_path: Path) -> None:
    process = begin(command(shards, tmp_path / "run", 2, *DYING), dies=0, MEDSAM2_TEST_HANGS="1")
    done = finish(process)
    assert done.returncode == -9 and alone(process, within=15)
    assert "is gone; rank 1 ends too" in done.stderr


@pytest.mark.slow
def test_rank_0_that_notices_by_itself_names_the_rank_and_prints_no_traceback(shards: Path, tmp_path: Path) -> None:
    process = begin(command(shards, tmp_path / "run", 2, *DYING), dies=1)
    done = finish(process)
    assert done.returncode == 1 and alone(process)
    assert "rank 1 (process" in done.stderr and "was ended by SIGKILL" in done.stderr
    assert "Traceback" not in done.stderr and "resume=auto" in done.stderr


@pytest.mark.slow
def test_torchrun_ends_the_job_of_a_killed_rank(shards: Path, tmp_path: Path) -> None:
    words = command(shards, tmp_path / "run", 2, *DYING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words[1:]]
    process = begin(launch, dies=1)
    done = finish(process)
    assert done.returncode == 1 and alone(process, within=35)
    assert "exitcode  : -9" in done.stderr and "rank      : 1" in done.stderr


@pytest.mark.slow
def test_ranks_wait_for_each_other_no_longer_than_they_are_told(shards: Path, tmp_path: Path) -> None:
    """Nobody dies; rank 1 is late for ever."""
    words = command(shards, tmp_path / "run", 2, "module=signalled.LateRank", "trainer.timeout_minutes=0.1")
    process = begin(words, dies=-1)
    before = time.monotonic()
    done = finish(process)
    assert done.returncode != 0 and alone(process) and time.monotonic() - before < 100
    assert "imed out" in done.stderr


def test_the_rank_that_a_signal_has_ended_is_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others fail because of it, perhaps before it is looked at."""
    started = [subprocess.Popen(["sh", "-c", line]) for line in ("exit 1", "kill -9 $$", "exit 143", "sleep 60")]
    monkeypatch.setattr(shutdown, "_ranks", list(started))  # type: ignore[arg-type]
    for process in started[:3]:
        process.wait()
    found = end_ranks(grace_seconds=0.1)
    assert found == RankEnd(2, started[1].pid, -9) and "SIGKILL" in str(found)
    assert started[3].poll() is not None and not shutdown._ranks


def test_a_rank_that_fails_after_rank_0_has_ended_well_fails_the_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started = [subprocess.Popen(["sh", "-c", "sleep 0.2; exit 2"])]
    monkeypatch.setattr(shutdown, "_ranks", started)
    with pytest.raises(SystemExit, match="2"), clean_shutdown(None, None):  # type: ignore[arg-type]  # of the run
        pass
    assert "rank 1" in capfd.readouterr().err
