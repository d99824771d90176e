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
from medsam2.data.catalog import Catalog
from medsam2.data.plan import Plan
from medsam2.errors import UserError
from medsam2.training.cases import TrainingData
from medsam2.training.check import clock, mean_step, reading
from medsam2.training.check_data import DataRow, check_data
from medsam2.training.check_step import StepFigures, first_of_each_kind, measure_steps, tensor_bytes
from medsam2.training.fit import fit
from medsam2.training.module import FineTuner
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
    fit(compose("train", given(shards, output, *more)))


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
    figures = StepFigures("CPU", {"clips": 0.1}, [1.0, 0.9, 0.8], 1 << 20, 1 << 30, 64 << 20)
    monkeypatch.setattr("medsam2.training.check.measure_steps", lambda *_: figures)


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
    for words in (
        "shards:d",
        "shards:e",
        "16x24 grey",
        "share of clips",
        "an epoch",
        "the run",
        "GiB free",
        "1 whole case",
    ):
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
    assert "4 thing(s) to mend" in done.stderr and "Traceback" not in done.stderr
    assert f"output={taken} already exists" in done.stderr and "missing.pt" in done.stderr
    assert "shards:e: e-train-000001.tar is missing" in done.stderr
    assert "shards:d: d-train-000000.tar has" in done.stderr and "index.json says" in done.stderr
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]


def test_a_clip_that_does_not_decode_is_named_with_its_file_and_the_others_are_read(tmp_path: Path) -> None:
    folder = build(tmp_path / "shards", SCANS[:2])
    catalog = Catalog(folder)
    location = catalog.location(0)
    with open(folder / location.shard, "r+b") as file:
        for offset, length in zip(location.frame_offset, location.frame_length, strict=True):
            file.seek(int(offset))
            file.write(bytes(int(length)))
    (row,) = check_data(plan(folder, "data.clips_per_batch=8"))
    assert 0 < row.read < 8
    assert f"{8 - row.read} of 8 clips cannot be read" in row.problems[0] and location.shard in row.problems[0]


def test_shards_behind_a_url_are_checked(
    shards: Path, tmp_path: Path, measured: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with HttpShards(shards) as server:
        check(server.url, tmp_path / "run", "validation.cases=2")
        cases = TrainingData(settings(server.url, tmp_path / "run", "validation.cases=2"), 64).validation_cases
        assert len(cases) > 0 and "cannot be read" not in capsys.readouterr().out


def test_a_scan_of_one_grey_value_is_doubted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import small_shards

    whole = small_shards.segment
    monkeypatch.setattr(
        small_shards, "segment", lambda scan, first: (lambda r, f, p: (r, f * 0 + 7, p))(*whole(scan, first))
    )
    (row,) = check_data(plan(build(tmp_path / "shards", SCANS[:2])))
    assert not row.problems and row.doubts == ("2 of 2 clips have one grey value only",)


def test_stills_and_clips_are_read_and_timed_apart(shards: Path) -> None:
    mixed = plan(shards, "data.stills.share=0.25", "data.stills.from_clips=true", "data.stills.clips_per_batch=3")
    rows = check_data(mixed)
    assert [(row.kind, row.source, row.read) for row in rows] == [
        ("clips", "shards:d", 2), ("clips", "shards:e", 2), ("stills", "shards:d", 3), ("stills", "shards:e", 3)
    ]  # fmt: skip
    assert sum(row.share for row in rows) == pytest.approx(1)
    steps = first_of_each_kind(mixed)
    assert [kind for kind, _ in steps] == ["clips"] * 3 + ["stills"] * 3
    assert all(mixed.kind(step) == kind for kind, step in steps)


def test_checkpoint_and_steps_are_those_of_the_run(shards: Path, tmp_path: Path) -> None:
    figures = measure_steps(settings(shards, tmp_path / "run"), FineTuner)
    assert figures.device == "CPU" and figures.finite and len(figures.losses) == 3
    assert 0 < figures.seconds["clips"] < 60 and 0 < figures.used < figures.free
    fit(compose("train", given(shards, tmp_path / "run", "mode=train", "trainer.max_steps=2")))
    size = (tmp_path / "run" / "checkpoints" / "last.ckpt").stat().st_size
    assert figures.checkpoint == pytest.approx(size, rel=0.03)
    text = problems(shards, tmp_path / "run", "resume=auto", "seed=4")
    assert "cannot resume: seed was 3 and is now 4" in text and text.startswith("check: 1 thing(s)")
    check(shards, tmp_path / "run", "resume=auto")


def test_too_little_room_for_the_checkpoints_is_a_problem(shards: Path, tmp_path: Path, measured: None) -> None:
    with small_disk(tmp_path / "disk", "60m") as disk:
        text = problems(shards, disk / "run")
        assert "2 checkpoints and the one being written take" in text and str(disk) in text
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
    assert "medsam2 doctor" in text and text.startswith("check: 1 thing(s)")


def test_every_phase_of_a_curriculum_is_checked(
    shards: Path, tmp_path: Path, measured: None, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = (
        "phases=[{name: a, override: {trainer: {max_steps: 1}}}, {name: b, override: {data: {include: [nothing]}}}]"
    )
    text = problems(shards, tmp_path / "run", phases)
    assert "phase b" in text and "data.include=['nothing'] matches none of organ" in text
    assert "phase a: nothing is wrong" in capsys.readouterr().out


def test_of_several_ranks_only_the_first_checks(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    check(shards, tmp_path / "run", "start=missing.pt")
    assert not capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ estimates


def row(kind: str, share: float, ms: float) -> DataRow:
    return DataRow("d", "MR", kind, share, 1, 1, 1, "16x24 grey", "3", ms)


def test_estimates_weigh_clips_and_stills_by_their_shares(shards: Path, tmp_path: Path) -> None:
    own = settings(shards, tmp_path, "data.stills.share=0.25", "data.stills.clips_per_batch=8", "data.workers=2")
    figures = StepFigures("CPU", {"clips": 1.0, "stills": 3.0}, [1.0], 1, 2, 3)
    assert mean_step(figures, 0.25) == pytest.approx(1.5)
    rows = [row("clips", 0.5, 10), row("clips", 0.25, 40), row("stills", 0.25, 5), row("stills", 0.0, math.nan)]
    # 2 clips of 20 ms on three steps of four, 8 stills of 5 ms on the fourth, by two workers
    assert reading(rows, own) == pytest.approx((0.75 * 2 * 0.020 + 0.25 * 8 * 0.005) / 2)


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (90, "2 min"), (7500, "2 h 05 min"), (8 * 86400, "8.0 days")]
)
def test_times_are_said_in_the_units_of_a_person(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_bytes_of_nested_tensors_are_summed() -> None:
    import torch

    assert tensor_bytes({"a": torch.zeros(3), "b": [torch.zeros(2, dtype=torch.int64), {"c": 1}]}) == 28
