"""`mode=check`: what a run would be, what is wrong with it, and nothing written."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from http_shards import HttpShards
from lightning.pytorch.utilities import rank_zero_only
from ranks import ROOT, SMALLEST
from small_disk import small_disk
from small_shards import SCANS, build

from medsam2.config import compose, validate
from medsam2.data.plan.plan import Plan
from medsam2.data.read.catalog import Catalog
from medsam2.errors import UserError
from medsam2.training.cases import TrainingData
from medsam2.training.fit import fit
from medsam2.training.module import FineTuner
from medsam2.training.preflight import Estimate, summary, take_steps, unreadable
from medsam2.training.preflight import check as check_run
from medsam2.training.settings import TrainSettings


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSAM2_SALT", "salt of the tests")
        return build(tmp_path_factory.mktemp("check") / "shards")


def given(shards: Path | str, output: Path, *more: str) -> list[str]:
    return [*SMALLEST, "mode=check", f"data.shards={shards}", f"output={output}", *more]


def settings(shards: Path | str, output: Path, *more: str) -> TrainSettings:
    return validate(TrainSettings, compose("train", given(shards, output, *more)))


def check(shards: Path | str, output: Path, *more: str) -> None:
    check_run(compose("train", given(shards, output, *more)))


def problems(shards: Path | str, output: Path, *more: str) -> str:
    with pytest.raises(UserError) as caught:
        check(shards, output, *more)
    return str(caught.value)


def plan(folder: Path, *more: str) -> Plan:
    own = settings(folder, folder / "run", *more)
    return Plan((Catalog(folder),), own.data, 3, own.data.clips_per_batch)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that were taken before, for tests of something else."""
    estimate = Estimate(
        settings("s", Path("o")), 0.01, "CPU", [0.2, 0.1, 0.1, 0.1], [1.0, 0.9, 0.8, 0.7], 1 << 20, 1 << 30
    )
    estimate.checkpoint = 64 << 20
    monkeypatch.setattr("medsam2.training.preflight.take_steps", lambda *_: estimate)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_good_run_is_described_and_nothing_is_written(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(shards)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    check(shards, tmp_path / "run", "validation.cases=1")
    assert not list(tmp_path.iterdir()) and files(shards) == before
    said = capsys.readouterr().out
    assert "nothing is wrong; nothing was written" in said
    for words in ("shards:d", "shards:e", "share of clips", "the run", "GiB are free", "all corrections"):
        assert words in said
    assert "8 steps" in said and "2 clips: 2 x 1 x 1 rank(s)" in said


def test_everything_that_is_wrong_is_said_at_once_with_status_two(shards: Path, tmp_path: Path) -> None:
    """From the command line, as a user starts it."""
    broken = build(tmp_path / "shards", SCANS)
    (broken / "e-train-000001.tar").unlink()
    (broken / "d-train-000000.tar").write_bytes((broken / "d-train-000000.tar").read_bytes()[:-1000])
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    command = [sys.executable, str(ROOT / "train.py"), *given(broken, taken, "start=missing.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "4 problem(s) to solve" in done.stderr and "Traceback" not in done.stderr
    assert f"output={taken} already exists" in done.stderr and "missing.pt" in done.stderr
    assert "shards:e: " in done.stderr and "e-train-000001.tar: missing" in done.stderr
    assert "d-train-000000.tar: " in done.stderr and "copy it again, or prepare again" in done.stderr
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]


def test_validation_cases_that_are_not_there_are_a_problem(shards: Path, tmp_path: Path, measured: None) -> None:
    found = problems(shards, tmp_path / "run", "validation.cases=1", f"validation.general=[{tmp_path / 'nowhere'}]")
    assert f"{tmp_path / 'nowhere'}: " in found


def test_a_clip_that_does_not_decode_is_named_with_its_file_and_the_others_are_read(tmp_path: Path) -> None:
    folder = build(tmp_path / "shards", SCANS[:2])
    catalog = Catalog(folder)
    location = catalog.location(0)
    with open(folder / location.shard, "r+b") as file:
        for offset, length in zip(location.frame_offset, location.frame_length, strict=True):
            file.seek(int(offset))
            file.write(bytes(int(length)))
    own = plan(folder, "data.clips_per_batch=8")
    found = list(unreadable(own, own.streams["clips"]))
    assert 1 <= len(found) <= 3 and all(text.startswith("shards:d: a clip cannot be read: ") for text in found)
    assert location.shard in found[0]


def test_shards_behind_a_url_are_checked(
    shards: Path, tmp_path: Path, measured: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with HttpShards(shards) as server:
        check(server.url, tmp_path / "run", "validation.cases=2")
        cases = TrainingData(settings(server.url, tmp_path / "run", "validation.cases=2"), 64).validation_cases
        assert len(cases) > 0 and "cannot be read" not in capsys.readouterr().out


def test_checkpoint_and_steps_are_those_of_the_run(shards: Path, tmp_path: Path) -> None:
    estimate = take_steps(settings(shards, tmp_path / "run"), FineTuner)
    assert estimate.device.startswith("CPU") and len(estimate.losses) == 4 and all(map(math.isfinite, estimate.losses))
    assert 0 < estimate.step < 60 and 0 < estimate.reading < 60 and 0 <= estimate.used < estimate.free
    fit(compose("train", given(shards, tmp_path / "run", "mode=train", "trainer.max_steps=2")))
    size = (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_size
    assert estimate.checkpoint == pytest.approx(size, rel=0.03)
    text = problems(shards, tmp_path / "run", "resume=auto", "seed=4")
    assert "cannot resume: seed was 3 and is now 4" in text and text.startswith("check: 1 problem(s)")
    check(shards, tmp_path / "run", "resume=auto")


def test_too_little_room_for_the_checkpoints_is_a_problem(shards: Path, tmp_path: Path, measured: None) -> None:
    with small_disk(tmp_path / "disk", "60m") as disk:
        text = problems(shards, disk / "run")
        assert "the checkpoints and one being written take" in text and str(disk) in text
        assert not list(disk.iterdir())


def test_a_loss_that_is_not_finite_is_a_problem(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wild.py").write_text(
        "from medsam2.training.module import FineTuner\n"
        "class Wild(FineTuner):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        return super().training_step(batch, batch_idx) * float('nan')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    text = problems(shards, tmp_path / "run", "module=wild.Wild")
    assert "a loss is not finite" in text and "lower optim.lr" in text


def test_a_gpu_that_is_not_here_is_a_problem_and_no_traceback(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    text = problems(shards, tmp_path / "run", "trainer=gpu")
    assert "medsam2 doctor" in text and text.startswith("check: 1 problem(s)")


def test_of_several_ranks_only_the_first_checks(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    check(shards, tmp_path / "run", "start=missing.pt")
    assert not capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ estimates


def test_the_estimate_of_a_run_is_that_of_the_slower_of_step_and_reading(shards: Path, tmp_path: Path) -> None:
    own = settings(shards, tmp_path, "trainer.max_steps=100", "trainer.accumulate=2", "data.workers=2")
    estimate = Estimate(own, 8.0, "CPU", [9.0, 1.0, 3.0, 5.0], [1.0], 1, 2, 3)
    cells = dict(summary(own, estimate, 1).lines)
    assert cells["step"].startswith("2 s") and "waits 50% of the time" in cells["reading"]
    assert cells["the run"].startswith("0:13:20 (100 steps)")
