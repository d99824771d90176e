"""Parts, restarts and ranks: killed and resumed, shared by processes, with cases that fail."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from medsam2.errors import UserError
from medsam2.evaluation import running
from medsam2.evaluation.evaluate import evaluate
from medsam2.evaluation.parts import Failure, Part, PartsFolder
from medsam2.evaluation.ranks import ALONE, Rank, find_rank, share
from medsam2.evaluation.settings import EvaluateSettings, MetricSettings, SourceSettings

ROOT = Path(__file__).resolve().parents[2]
COST = ["seconds", "peak_mb"]  # what differs between two runs


def _settings(checkpoints: tuple[Path, Path], source: Path, output: Path, **more: object) -> EvaluateSettings:
    return EvaluateSettings(
        checkpoint=str(checkpoints[1]),
        data=SourceSettings(source=str(source)),
        output=str(output),
        metrics=MetricSettings(surfaces=False),
        **{"resamples": 200, "overlays": 1, "worst": 1, "device": "cpu", **more},  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def scans(write, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    return write.nnunet(tmp_path_factory.mktemp("scans") / "Dataset007_Scans", cases=4)


@pytest.fixture(scope="module")
def undisturbed(checkpoints: tuple[Path, Path], scans: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSAM2_SALT", "salt of the tests")
        return evaluate(_settings(checkpoints, scans, tmp_path_factory.mktemp("whole") / "out")).rows


def _same(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(found.drop(columns=COST), expected.drop(columns=COST))


def _command(checkpoints: tuple[Path, Path], scans: Path, output: Path, *more: str) -> list[str]:
    given = (f"checkpoint={checkpoints[1]}", f"data.source={scans}", f"output={output}", "resamples=200", "overlays=1")
    return [sys.executable, "evaluate.py", *given, "worst=1", "device=cpu", "metrics.surfaces=false", *more]


def _start(line: list[str], **environment: str) -> subprocess.Popen[str]:
    every = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(line, cwd=ROOT, env=every, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait_for(condition, seconds: float = 90) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_a_run_that_was_killed_and_resumed_gives_the_table_of_an_undisturbed_one(
    checkpoints: tuple[Path, Path], scans: Path, undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = _start(_command(checkpoints, scans, output))
    _wait_for(lambda: len(list(output.glob("parts/Dataset*.json"))) >= 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in output.glob("parts/Dataset*.json")}
    assert 1 <= len(kept) < 4 and not (output / "cases.parquet").exists()
    found = evaluate(_settings(checkpoints, scans, output, resume=True))
    _same(found.rows, undisturbed)
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert len(list(output.glob("worst/*/*.png"))) == 1


def test_without_resume_an_interrupted_run_is_refused_and_the_remedy_is_named(
    checkpoints: tuple[Path, Path], scans: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "parts").mkdir(parents=True)
    (tmp_path / "out" / "parts" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="resume=true"):
        evaluate(_settings(checkpoints, scans, tmp_path / "out"))


def test_two_ranks_share_the_cases_and_rank_0_makes_the_table(
    checkpoints: tuple[Path, Path], scans: Path, undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    line = _command(checkpoints, scans, output, "wait_minutes=1")
    launched = {"WORLD_SIZE": "2", "MASTER_PORT": "1234"}
    ranks = [_start(line, RANK=str(rank), LOCAL_RANK=str(rank), **launched) for rank in (1, 0)]
    ended = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], ended
    assert ": scores" not in ended[0][0] and ": scores" in ended[1][0]
    _same(pd.read_parquet(output / "cases.parquet"), undisturbed)


def test_two_worker_processes_give_the_table_of_one(
    checkpoints: tuple[Path, Path], scans: Path, undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    _same(evaluate(_settings(checkpoints, scans, tmp_path / "out", workers=2)).rows, undisturbed)


def test_a_worker_that_is_killed_costs_its_case_alone(
    checkpoints: tuple[Path, Path], scans: Path, undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = _start(_command(checkpoints, scans, output, "workers=2", "max_failed=0.5"))
    _wait_for(lambda: list(output.glob("parts/rank-*.now")))
    hand = next(output.glob("parts/rank-*.now"))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(workers[int(hand.stem.partition("-")[2])], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (failure,) = csv.DictReader((output / "failures.csv").open())
    assert failure["stage"] == "killed" and "signal 9" in failure["reason"]
    rows = pd.read_parquet(output / "cases.parquet")
    assert set(undisturbed["case"]) - set(rows["case"]) == {failure["case"]}
    _same(evaluate(_settings(checkpoints, scans, output, resume=True)).rows, undisturbed)
    assert not (output / "failures.csv").exists()


def test_a_case_that_fails_in_prediction_is_named_and_the_others_are_scored(
    checkpoints: tuple[Path, Path], scans: Path, undisturbed: pd.DataFrame, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real, bad = running.predict_case, undisturbed["case"].iloc[-1]

    def out_of_memory(predictor, case, *rest):  # type: ignore[no-untyped-def]
        if case.case == bad:
            raise MemoryError("cannot allocate 8 GB")
        return real(predictor, case, *rest)

    monkeypatch.setattr(running, "predict_case", out_of_memory)
    settings = _settings(checkpoints, scans, tmp_path / "out", max_failed=0.25)
    found = evaluate(settings)
    (failure,) = found.summary["failures"]
    assert failure["case"] == bad and failure["stage"] == "predict" and "cannot allocate 8 GB" in failure["reason"]
    assert "batch_frames=1" in failure["remedy"]
    assert "cannot allocate 8 GB" in (tmp_path / "out" / "report.html").read_text()
    assert found.rows["case"].nunique() == 3
    with pytest.raises(UserError, match="max_failed=0.1"):
        evaluate(settings.model_copy(update={"max_failed": 0.1, "output": str(tmp_path / "strict")}))
    assert len(pd.read_csv(tmp_path / "strict" / "cases.csv")) == len(found.rows)


def test_where_everything_fails_the_run_ends_early_with_the_reason(
    checkpoints: tuple[Path, Path], scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def broken(predictor, case, *rest):  # type: ignore[no-untyped-def]
        tried.append(case.case)
        raise TypeError("a fault of the program")

    monkeypatch.setattr(running, "predict_case", broken)
    monkeypatch.setattr(running, "HOPELESS", 2)
    with pytest.raises(UserError, match="the first 2 cases all failed.*TypeError.*a fault of the program"):
        evaluate(_settings(checkpoints, scans, tmp_path / "out"))
    assert len(tried) == 2


def test_resuming_with_other_settings_is_refused_and_they_are_named(
    checkpoints: tuple[Path, Path], scans: Path, tmp_path: Path
) -> None:
    first = _settings(checkpoints, scans, tmp_path / "out", limit=1)
    evaluate(first)
    other = first.model_copy(update={"resume": True, "precision": "bf16"})
    with pytest.raises(UserError, match="precision was .fp32., now .bf16."):
        evaluate(other)
    assert evaluate(first.model_copy(update={"resume": True, "limit": 2})).rows["case"].nunique() == 2


def test_other_weights_under_the_same_name_are_other_settings(
    checkpoints: tuple[Path, Path], scans: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "mine.safetensors"
    checkpoint.write_bytes(checkpoints[1].read_bytes())
    settings = _settings((checkpoint, checkpoint), scans, tmp_path / "out", limit=1)
    evaluate(settings)
    checkpoint.write_bytes(checkpoints[0].read_bytes())
    with pytest.raises(UserError, match=r"checkpoint\.0\.1 was"):
        evaluate(settings.model_copy(update={"resume": True}))


def test_a_damaged_part_a_changed_case_and_an_earlier_failure_are_done_again(tmp_path: Path) -> None:
    parts = PartsFolder(tmp_path, {"seed": 0}, "first")
    parts.begin(resume=False)
    done = Part(0, "a", "set", "hash", "state", parts.attempt, rows=({"dsc": float("nan"), "leak": None},))
    parts.write(done)
    failed = Part(1, "b", "set", "hash", "state", parts.attempt, failure=Failure("read", "cut short", "mend it"))
    parts.write(failed)
    found = parts.settled("a", "state")
    assert found is not None and found.rows[0]["leak"] is None and found.rows[0]["dsc"] != found.rows[0]["dsc"]
    assert parts.settled("a", "other state") is None
    assert parts.settled("b", "state") == failed
    again = PartsFolder(tmp_path, {"seed": 0}, "second")
    again.begin(resume=True)
    assert again.settled("a", "state") is not None
    assert again.settled("b", "state") is None and again.find("b", "state") == failed
    text = (tmp_path / "parts" / "a.json").read_text()
    (tmp_path / "parts" / "a.json").write_text(text[: len(text) // 2])
    assert again.settled("a", "state") is None


def test_other_ranks_join_the_launch_of_rank_0_alone(tmp_path: Path) -> None:
    PartsFolder(tmp_path, {"seed": 0}, "yesterday").begin(resume=False)
    late = PartsFolder(tmp_path, {"seed": 0}, "today")
    with pytest.raises(UserError, match="rank 0 did not start"):
        late.join(minutes=0)
    PartsFolder(tmp_path, {"seed": 1}, "today").begin(resume=False)
    with pytest.raises(UserError, match="rank 0 has other settings"):
        late.join(minutes=1)
    leader = PartsFolder(tmp_path, {"seed": 0}, "today")
    leader.begin(resume=False)
    late.join(minutes=1)
    assert late.attempt == leader.attempt != ""
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["content"] == {"seed": 0}


def test_ranks_come_from_torchrun_and_srun_but_not_from_a_batch_script() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
    assert find_rank(torchrun).index == 3 and find_rank(torchrun).local == 1 and not find_rank(torchrun).again
    assert find_rank({**torchrun, "TORCHELASTIC_RESTART_COUNT": "1"}).again
    srun = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"}
    assert (find_rank(srun).index, find_rank(srun).count) == (1, 2) and "7" in find_rank(srun).launch
    assert find_rank({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == ALONE
    with pytest.raises(UserError, match="RANK=4 is not below WORLD_SIZE=4"):
        find_rank({**torchrun, "RANK": "4"})


def test_shares_hold_every_case_once_in_order_and_weigh_about_the_same() -> None:
    sizes = [40, 1, 1, 30, 12, 9, 1, 40, 3, 8]
    dealt = share(sizes, 3)
    assert sorted(number for numbers in dealt for number in numbers) == list(range(len(sizes)))
    assert all(numbers == sorted(numbers) for numbers in dealt)
    loads = [sum(sizes[number] for number in numbers) for numbers in dealt]
    assert max(loads) - min(loads) <= 10 and share(sizes, 3) == dealt
    assert share([1], 3) == [[0], [], []]


def test_workers_under_ranks_are_refused(checkpoints: tuple[Path, Path], scans: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give workers=1"):
        evaluate(_settings(checkpoints, scans, tmp_path / "out", workers=2), Rank(0, 2, 0, "x"))
