"""Interrupted and resumed evaluations, ranks that share the cases, and cases that fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from medsam2.cli.main import main
from medsam2.errors import UserError
from medsam2.evaluation.corruptions.registry import CorruptionSettings
from medsam2.evaluation.evaluate import evaluate
from medsam2.evaluation.run import cases
from medsam2.evaluation.run.ranks import SINGLE_RANK, Rank, find_rank
from medsam2.evaluation.run.resume import CaseResult, CaseResults, Failure
from medsam2.evaluation.settings import EvaluateSettings, MetricSettings, SourceSettings

ROOT = Path(__file__).resolve().parents[3]
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


def _assert_same(rows: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(rows.drop(columns=COST), expected.drop(columns=COST))


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


def _lines(output: Path) -> list[bytes]:
    return [line for path in output.glob("parts/rank-*.jsonl") for line in path.read_bytes().splitlines(keepends=True)]


def test_a_run_that_was_killed_and_resumed_gives_the_table_of_an_undisturbed_one(
    checkpoints: tuple[Path, Path], scans: Path, undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = _start(_command(checkpoints, scans, output))
    _wait_for(lambda: len(_lines(output)) >= 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()
    kept = _lines(output)
    assert 1 <= len(kept) < 4 and not (output / "cases.parquet").exists()
    report = evaluate(_settings(checkpoints, scans, output, resume=True))
    _assert_same(report.rows, undisturbed)
    assert _lines(output)[: len(kept)] == kept and len(_lines(output)) == 4, "finished cases are not done again"
    assert len(list(output.glob("worst/*/*.png"))) == 1


def test_without_resume_an_interrupted_run_is_refused_and_the_remedy_is_named(
    checkpoints: tuple[Path, Path], scans: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "parts").mkdir(parents=True)
    (tmp_path / "out" / "parts" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="resume=true"):
        evaluate(_settings(checkpoints, scans, tmp_path / "out"))


def _ranks(line: list[str]) -> list[subprocess.Popen[str]]:
    """Two ranks, as torchrun starts them: rank 0 first in the list."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [_start(line, RANK=str(rank), LOCAL_RANK=str(rank), **launched) for rank in (0, 1)]


@pytest.mark.slow
def test_two_ranks_share_the_cases_and_rank_0_makes_the_table(
    checkpoints: tuple[Path, Path], scans: Path, undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    ranks = _ranks(_command(checkpoints, scans, output))
    ended = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], ended
    assert ": scores" in ended[0][0] and ": scores" not in ended[1][0]
    assert [len((output / f"parts/rank-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)] == [2, 2]
    _assert_same(pd.read_parquet(output / "cases.parquet"), undisturbed)


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_and_loses_at_most_its_running_case(
    checkpoints: tuple[Path, Path], scans: Path, undisturbed: pd.DataFrame, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    ranks = _ranks(_command(checkpoints, scans, output))
    _wait_for(lambda: (output / "parts/rank-1.jsonl").exists())
    ranks[1].send_signal(signal.SIGKILL)
    _, errors = ranks[0].communicate(timeout=120)
    ranks[1].communicate()
    assert ranks[0].returncode == 2 and "resume=true" in errors and "Traceback" not in errors
    before = len(_lines(output))
    _assert_same(evaluate(_settings(checkpoints, scans, output, resume=True)).rows, undisturbed)
    assert before >= 2 and len(_lines(output)) <= 5


def test_a_case_that_fails_in_prediction_is_named_and_the_others_are_scored(
    checkpoints: tuple[Path, Path], scans: Path, undisturbed: pd.DataFrame, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real, bad = cases.predict_case, undisturbed["case"].iloc[-1]

    def out_of_memory(predictor, case, *rest):  # type: ignore[no-untyped-def]
        if case.case == bad:
            raise MemoryError("cannot allocate 8 GB")
        return real(predictor, case, *rest)

    monkeypatch.setattr(cases, "predict_case", out_of_memory)
    settings = _settings(checkpoints, scans, tmp_path / "out", max_failed=0.25)
    report = evaluate(settings)
    (failure,) = report.summary["failures"]
    assert failure["case"] == bad and failure["stage"] == "predict" and "cannot allocate 8 GB" in failure["reason"]
    assert "batch_frames=1" in failure["remedy"]
    assert "cannot allocate 8 GB" in (tmp_path / "out" / "report.html").read_text()
    assert report.rows["case"].nunique() == 3
    with pytest.raises(UserError, match="max_failed=0.1"):
        evaluate(settings.model_copy(update={"max_failed": 0.1, "output": str(tmp_path / "strict")}))
    assert len(pd.read_csv(tmp_path / "strict" / "cases.csv")) == len(report.rows)


def test_where_everything_fails_the_run_ends_early_with_the_reason(
    checkpoints: tuple[Path, Path], scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def broken(predictor, case, *rest):  # type: ignore[no-untyped-def]
        tried.append(case.case)
        raise TypeError("a fault of the program")

    monkeypatch.setattr(cases, "predict_case", broken)
    monkeypatch.setattr(cases, "MAX_FAILURES_BEFORE_FIRST_SUCCESS", 2)
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


def test_an_evaluation_of_an_earlier_version_resumes_unless_its_corruptions_have_other_noise(
    checkpoints: tuple[Path, Path], scans: Path, tmp_path: Path
) -> None:
    earlier = {
        "version", "checkpoint", "protocols", "metrics", "corruption", "seed", "memory", "precision", "compile",
        "structures", "data", "pictures",
    }  # fmt: skip
    clean = _settings(checkpoints, scans, tmp_path / "clean", limit=1)
    evaluate(clean)
    recorded = json.loads((tmp_path / "clean" / "parts" / "run.json").read_text())
    assert recorded.keys() == earlier and recorded["corruption"] is None and recorded["pictures"] == [1, 1]

    corruption = CorruptionSettings(names=("contrast",), severities=(1,))
    corrupted = _settings(checkpoints, scans, tmp_path / "corrupted", limit=1, corruption=corruption)
    evaluate(corrupted)
    run = tmp_path / "corrupted" / "parts" / "run.json"
    run.write_text(json.dumps({name: value for name, value in json.loads(run.read_text()).items() if name in earlier}))
    with pytest.raises(UserError, match="noise was null, now"):
        evaluate(corrupted.model_copy(update={"resume": True}))


def test_other_weights_under_the_same_name_are_other_settings(
    checkpoints: tuple[Path, Path], scans: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "mine.safetensors"
    checkpoint.write_bytes(checkpoints[1].read_bytes())
    settings = _settings((checkpoint, checkpoint), scans, tmp_path / "out", limit=1)
    evaluate(settings)
    checkpoint.write_bytes(checkpoints[0].read_bytes())
    with pytest.raises(UserError, match="checkpoint was"):
        evaluate(settings.model_copy(update={"resume": True}))


def test_a_torn_line_a_changed_case_and_an_earlier_failure_are_done_again(tmp_path: Path) -> None:
    results = CaseResults(tmp_path, {"seed": 0})
    results.begin()
    done = CaseResult("a", "set", "hash", results.fingerprint("state"), rows=({"dsc": float("nan"), "leak": None},))
    failed = replace(done, key="b", rows=(), failure=Failure("read", "cut short", "mend it"))
    results.append(0, failed)
    with (tmp_path / "parts" / "rank-0.jsonl").open("ab") as file:
        file.write(b'{"key": "c", "dataset"')
    results.append(0, done)
    again = CaseResults(tmp_path, {"seed": 0})
    again.begin()
    again.load()
    result = again.find("a", "state")
    assert result is not None and result.rows[0]["leak"] is None and result.rows[0]["dsc"] != result.rows[0]["dsc"]
    assert again.find("a", "other state") is None and again.find("c", "state") is None
    assert again.find("b", "state") == failed
    later = replace(failed, failure=Failure("read", "not readable", "mend it"))
    again.append(1, later)
    again.load()
    assert again.find("b", "state") == later
    again.append(1, replace(failed, rows=({"dsc": 1.0},), failure=None))
    again.load()
    success = again.find("b", "state")
    assert success is not None and success.failure is None
    with pytest.raises(UserError, match="seed was 0, now 1"):
        CaseResults(tmp_path, {"seed": 1}).begin()


SLOW = pytest.mark.slow


@pytest.mark.parametrize("change", ["masks", pytest.param("spacing", marks=SLOW), pytest.param("window", marks=SLOW)])
def test_cases_whose_masks_spacing_or_window_changed_are_scored_anew(
    checkpoints: tuple[Path, Path], write, tmp_path: Path, change: str
) -> None:
    folder = write.nnunet(tmp_path / "Dataset008_Changed", cases=3)
    plan, more = ["--split", "0.5,0.5"], [] if change != "window" else ["--window", "lung"]
    _prepare(folder, tmp_path / "shards", plan)
    settings = _settings(checkpoints, tmp_path / "shards", tmp_path / "out", split="all", overlays=0, worst=0)
    before = evaluate(settings).rows
    (image, *_), (mask, *_) = (sorted((folder / name).glob("*.nii.gz")) for name in ("imagesTr", "labelsTr"))
    if change == "masks":
        grid = sitk.ReadImage(mask)
        moved = sitk.GetImageFromArray(np.roll(sitk.GetArrayFromImage(grid), 3, axis=2))
        moved.CopyInformation(grid)
        sitk.WriteImage(moved, mask)
    if change == "spacing":
        for path in (image, mask):
            grid = sitk.ReadImage(path)
            grid.SetSpacing([3 * side for side in grid.GetSpacing()])
            sitk.WriteImage(grid, path)
    shutil.rmtree(tmp_path / "shards")
    _prepare(folder, tmp_path / "shards", [*plan, *more])
    resumed = evaluate(settings.model_copy(update={"resume": True})).rows
    _assert_same(resumed, evaluate(settings.model_copy(update={"output": str(tmp_path / "fresh")})).rows)
    if change != "spacing":  # DSC does not depend on it
        assert resumed["dsc"].tolist() != before["dsc"].tolist()


def _prepare(source: Path, shards: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["prepare", str(source), "--out", str(shards), "--modality", "CT", "--workers", "1", *options])


def test_ranks_come_from_torchrun_and_srun_but_not_from_a_batch_script() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert find_rank(torchrun) == Rank(3, 4, 1) and find_rank({**torchrun, "TORCHELASTIC_RESTART_COUNT": "1"}).restarted
    assert find_rank({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}) == Rank(1, 2, 1)
    assert find_rank({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == SINGLE_RANK
