"""The whole evaluation: files, table, leaks, and the errors of `python evaluate.py` as a user meets them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from medsam2.errors import UserError
from medsam2.evaluation.evaluate import EvaluationResult, evaluate, short_names
from medsam2.evaluation.settings import EvaluateSettings, ProtocolSettings, SourceSettings
from medsam2.model.build import load_model, save_asset
from medsam2.shards.index import read_index

ROOT = Path(__file__).resolve().parents[2]


def _settings(checkpoints: tuple[Path, ...], source: Path, output: Path, **more: object) -> EvaluateSettings:
    return EvaluateSettings(
        checkpoint=tuple(map(str, checkpoints)),
        data=SourceSettings(source=str(source)),
        protocol=ProtocolSettings(name="largest_box_both"),
        output=str(output),
        **{"resamples": 200, **more},  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def result(checkpoints: tuple[Path, Path], shards: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationResult:
    output = tmp_path_factory.mktemp("evaluation") / "out"
    return evaluate(_settings(checkpoints, shards, output, split="all", limit=1, overlays=1))


def test_there_is_one_row_a_checkpoint_case_and_object(result: EvaluationResult) -> None:
    rows = result.rows
    assert set(rows["checkpoint"]) == {"before", "after"}
    assert not rows.duplicated(["checkpoint", "dataset", "case", "object"]).any()
    first, second = (rows[rows["checkpoint"] == label] for label in ("before", "after"))
    keys = ["dataset", "case", "object", "structure", "voxels"]
    assert first[keys].to_records(index=False).tolist() == second[keys].to_records(index=False).tolist()


def test_the_folder_holds_equal_tables_and_a_documented_summary(result: EvaluationResult) -> None:
    parquet, csv = pd.read_parquet(result.folder / "cases.parquet"), pd.read_csv(result.folder / "cases.csv")
    assert len(parquet) == len(csv) == len(result.rows)
    assert parquet["dsc"].tolist() == pytest.approx(csv["dsc"].tolist())
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert summary["checkpoints"] == ["before", "after"] and summary["grid"] == "stored"
    total = summary["groups"][-1]
    assert (total["modality"], total["structure"]) == ("all", "all")
    assert set(total["dsc"]) == {"before", "after"}
    assert set(total["dsc_change"]) == {"from", "to", "mean", "low", "high"}
    assert {g["modality"] for g in summary["groups"]} == {"CT", "US", "ENDOSCOPY", "all"}


def test_the_page_is_self_contained_and_shows_the_pictures(result: EvaluationResult) -> None:
    page = (result.folder / "report.html").read_text()
    pictures = list((result.folder / "overlays").glob("*.png"))
    assert pictures and page.count("data:image/jpeg;base64,") == len(pictures)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("<tr") == page.count("</tr>") and "largest_box_both" in page


def test_names_of_patients_are_nowhere(result: EvaluationResult) -> None:
    for path in result.folder.rglob("*"):
        if path.is_file():
            assert b"smith" not in path.read_bytes() and "smith" not in path.name


def test_a_case_that_was_trained_on_is_reported_as_a_leak(
    checkpoints: tuple[Path, Path], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(checkpoints[0])
    table = read_index(shards).table
    seen = table["content_hash"].to_pylist()[table["split"].to_pylist().index("val")]
    save_asset(tmp_path / "leaky.safetensors", loaded.sam.state_dict(), loaded.spec, {"content_hashes": [seen]})
    pair = (checkpoints[0], tmp_path / "leaky.safetensors")
    found = evaluate(_settings(pair, shards, tmp_path / "out", overlays=0))
    assert found.summary["leaks"] == {"before": 0, "leaky": 1}
    rows = found.rows
    assert rows[rows["leak"]]["checkpoint"].unique().tolist() == ["leaky"]
    printed = capsys.readouterr().out
    assert "Leak: leaky was trained on 1 of these cases" in printed and "leak" in printed


def test_raw_data_scores_as_its_shards_do(
    checkpoints: tuple[Path, Path], raw_folder: Path, shards: Path, tmp_path: Path
) -> None:
    recist = raw_folder / "recist"
    raw = evaluate(_settings(checkpoints[:1], recist, tmp_path / "raw", overlays=0)).rows
    stored = evaluate(_settings(checkpoints[:1], shards, tmp_path / "stored", overlays=0, split="all")).rows
    merged = raw.merge(stored, on=["dataset", "case", "structure"], suffixes=("", "_stored"))
    whole = merged[merged["frames"] == merged["frames_stored"]]
    assert len(whole) and whole["dsc"].tolist() == pytest.approx(whole["dsc_stored"].tolist())
    assert whole["nsd"].tolist() == pytest.approx(whole["nsd_stored"].tolist())


def test_an_unreadable_case_is_left_out_and_counted(
    checkpoints: tuple[Path, Path], write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write.nnunet(tmp_path / "Dataset009_Broken", cases=2)
    broken = folder / "imagesTr" / "smith_000_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:400])
    found = evaluate(_settings(checkpoints[:1], folder, tmp_path / "out", overlays=0))
    assert found.summary["failed"] == 1 and found.rows["case"].nunique() == 1
    captured = capsys.readouterr()
    assert "1 cases could not be read" in captured.out and "smith_000" in captured.err.replace("\n", "")


def test_an_output_folder_that_holds_something_is_refused_before_any_work(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        evaluate(_settings((Path("nowhere.pt"),), shards, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_labels_are_short_and_unique() -> None:
    names = ("nano", "runs/mine/checkpoints/best.ckpt", "a/tiny.pt", "b/tiny.pt", "runs/other")
    assert short_names(names) == ("nano", "mine", "tiny-1", "tiny-2", "other")


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment, line = {**os.environ, "OMP_NUM_THREADS": "1"}, [sys.executable, "evaluate.py", *arguments]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_the_command_prints_one_table(checkpoints: tuple[Path, Path], shards: Path, tmp_path: Path) -> None:
    done = _command(
        f"checkpoint=[{checkpoints[0]},{checkpoints[1]}]", f"data.source={shards}", f"output={tmp_path / 'out'}",
        "structures=[lesion]", "protocol=largest_click_both", "limit=1", "overlays=0", "resamples=200",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("┏") == 1 and "largest_click_both" in done.stdout and "lesion" in done.stdout
    assert "organ" not in done.stdout


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ("protocol=largest_box_bothh", "Did you mean 'largest_box_both'?"),
        ("data.source=nowhere/at/all", "nowhere"),
        ("nsd_m=3", "Did you mean 'nsd_mm'?"),
    ],
)
def test_a_mistake_gives_one_clear_error_and_status_2(wrong: str, what: str, shards: Path, tmp_path: Path) -> None:
    given = {"checkpoint": "nano", "data.source": str(shards), "output": str(tmp_path / "out")}
    arguments = [f"{key}={value}" for key, value in given.items() if not wrong.startswith(f"{key}=")]
    done = _command(*arguments, wrong)
    assert done.returncode == 2
    assert what in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
