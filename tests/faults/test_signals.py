"""SIGTERM and SIGUSR1 anywhere: all ranks stop after the same step, saved, with 143 or queued again."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import pytest
import signalled
import torch
from ranks import ROOT, SMALLEST, alone, column, command, finish, losses, start
from signalled import PLACE, SIGNAL
from small_shards import build

from medsam2.config import compose
from medsam2.training.fit import fit
from medsam2.training.launch import signals
from medsam2.training.launch.stopping import status_after_stop

STEPS = ("trainer.max_steps=3", "trainer.checkpoint_every=3", "trainer.val_every=2", "validation.clips=2")
SAVED = {
    "construction": None, "fit_start": None, "train_start": 1, "batch_start": 2, "forward": 2, "backward": 2,
    "update": 2, "save": 2, "validation": 2, "validation_end": 3,
}  # fmt: skip  # place of the signal -> the step at which the run is saved, None: nothing was done yet


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSAM2_SALT", "salt of the tests")
        return build(tmp_path_factory.mktemp("signals") / "shards")


def run(shards: Path, output: Path, *more: str) -> None:
    own = (f"data.shards={shards}", f"output={output}", "module=signalled.Signalled", "trainer.progress=none")
    fit(compose("train", [*SMALLEST, *STEPS, *own, *more]))


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(shards, folder)
    return folder


def step_of(folder: Path) -> int | None:
    path = folder / "checkpoints" / "last.ckpt"
    return int(torch.load(path, weights_only=True)["global_step"]) if path.exists() else None


def places() -> list[Any]:
    """Every place with both signals; all but a few of them in the slow suite."""
    pairs = [(place, number) for place in SAVED for number in (signal.SIGTERM, signal.SIGUSR1)]
    fast = {("train_start", signal.SIGTERM), ("update", signal.SIGTERM), ("save", signal.SIGUSR1)}
    return [pytest.param(*pair, marks=[] if pair in fast else [pytest.mark.slow]) for pair in pairs]


@pytest.mark.parametrize(("place", "number"), places())
def test_a_run_that_gets_a_signal_is_saved_and_goes_on_as_if_there_had_been_none(
    shards: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int
) -> None:
    monkeypatch.setenv(PLACE, place)
    monkeypatch.setenv(SIGNAL, str(int(number)))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        run(shards, tmp_path / "run")
    assert ended.value.code == 143 and os.environ[PLACE] == ""
    assert step_of(tmp_path / "run") == SAVED[place]
    assert signal.getsignal(number) == before and signals.received_signal() == signals.NONE
    assert not list((tmp_path / "run").rglob(".*.partial"))
    if place in ("train_start", "forward", "save", "validation"):
        run(shards, tmp_path / "run", "resume=auto")
        for name in ("train/loss", "val/loss"):
            assert column(tmp_path / "run", name) == column(undisturbed, name) != {}


@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_stops_both_at_the_same_step(shards: Path, tmp_path: Path) -> None:
    process = start(shards, tmp_path / "run", 2, "module=signalled.OneRank")
    done = finish(process)
    assert done.returncode == 143, done.stderr[-3000:]
    assert alone(process) and step_of(tmp_path / "run") == 2 and list(losses(tmp_path / "run")) == [0, 1]
    assert "Traceback" not in done.stderr and done.stdout.count("stopped by SIGTERM") == 1


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    end = time.monotonic() + 120
    while max(losses(folder), default=-1) < step:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_signal_to_every_process_of_a_job_spares_those_that_load_data(shards: Path, tmp_path: Path) -> None:
    """As SLURM sends it before a time limit or a preemption; twice, as it may."""
    more = ("data.workers=2", "trainer.max_steps=10000", "trainer.checkpoint_every=10000")
    process = start(shards, tmp_path / "run", 1, *more)
    wait_for_step(process, tmp_path / "run", 1)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
    done = finish(process)
    assert done.returncode == 143 and alone(process), done.stderr[-3000:]
    assert step_of(tmp_path / "run") == max(losses(tmp_path / "run")) + 1


def fake_scontrol(folder: Path, status: int = 0) -> Path:
    """A folder for PATH with an scontrol that writes its arguments to `calls`."""
    folder.mkdir()
    path = folder / "scontrol"
    path.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\nexit {status}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def wrapper_of_the_guide(line: str) -> str:
    """The batch script in docs/how-to/preemptible.md, with another command in the place of its training."""
    text = (ROOT / "docs" / "how-to" / "preemptible.md").read_text()
    script = next(block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "#SBATCH" in block)
    before, training = script.split("python train.py")
    assert before.endswith("docker/forward.sh ") and training.endswith("resume=auto\n")
    return before + line


@pytest.mark.slow
def test_a_signal_to_the_wrapper_alone_is_passed_on_and_the_job_is_queued_again(shards: Path, tmp_path: Path) -> None:
    scontrol = fake_scontrol(tmp_path / "bin")
    words = command(shards, tmp_path / "run", 1, "trainer.max_steps=10000", "trainer.checkpoint_every=10000")
    script = tmp_path / "job.sh"
    script.write_text(wrapper_of_the_guide(" ".join(f"'{word}'" for word in words)))
    environment = {**os.environ, "PATH": f"{scontrol}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    process = subprocess.Popen(
        ["bash", str(script)], env={**environment, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT,
    )  # fmt: skip
    wait_for_step(process, tmp_path / "run", 1)
    process.send_signal(signal.SIGUSR1)
    done = finish(process)
    assert done.returncode == 0 and alone(process), done.stderr[-3000:]
    assert (scontrol / "calls").read_text() == "requeue 77\n"
    assert step_of(tmp_path / "run") == max(losses(tmp_path / "run")) + 1


@pytest.mark.parametrize(
    ("requeue", "level", "requeued"),
    [("auto", signals.WARNED, True), ("auto", signals.TERMINATE, False), (True, signals.TERMINATE, True),
     (False, signals.WARNED, False)],
)  # fmt: skip
def test_a_job_is_queued_again_when_it_was_warned_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requeue: Literal["auto"] | bool, level: int, requeued: bool
) -> None:
    monkeypatch.setenv("PATH", str(fake_scontrol(tmp_path / "bin")))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert status_after_stop(requeue, level, 0) == 143
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert status_after_stop(requeue, level, 0) == (0 if requeued else 143)
    assert (tmp_path / "bin" / "calls").exists() == requeued


@pytest.mark.parametrize(("answer", "status"), [(0, 0), (1, 143), (None, 143)])
def test_the_status_is_zero_only_where_slurm_has_taken_the_job_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], answer: int | None, status: int
) -> None:
    scontrol = fake_scontrol(tmp_path / "bin", answer or 0)
    monkeypatch.setenv("PATH", str(scontrol) if answer is not None else str(tmp_path))
    for name, value in (("JOB_ID", "9"), ("ARRAY_JOB_ID", "5"), ("ARRAY_TASK_ID", "3")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert status_after_stop("auto", signals.WARNED, rank=0) == status
    assert status_after_stop("auto", signals.WARNED, rank=1) == 0
    if answer is not None:
        assert (scontrol / "calls").read_text() == "requeue 5_3\n"
    assert ("SLURM job 5_3 was not queued again" in capfd.readouterr().err) == bool(status)


def test_ctrl_c_saves_the_step_and_ends_with_130(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signalled, "TIMES", 1)
    monkeypatch.setenv(PLACE, "forward")
    monkeypatch.setenv(SIGNAL, str(int(signal.SIGINT)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores Ctrl-C
    try:
        with pytest.raises(SystemExit) as ended:
            run(shards, tmp_path / "run")
        restored = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130 and step_of(tmp_path / "run") == 2
    printed = capfd.readouterr()
    assert "Ctrl-C again ends it at once" in printed.err and "stopped by SIGINT; the run goes on" in printed.out
    assert restored is signal.default_int_handler


def test_installing_the_handlers_needs_no_torch() -> None:
    """The handlers are there before seconds of imports."""
    code = "import sys; from medsam2.training.launch import signals; signals.install_handlers(); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
