"""The quick start runs real commands in order, times them, and reads the summary from their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medsam2.cli.main import COMMANDS
from medsam2.demo import quickstart
from medsam2.demo.quickstart import Stage, build_summary, print_summary, run, stages
from medsam2.errors import UserError


def group(modality: str, structure: str, before: float, after: float) -> dict[str, object]:
    change = {"from": "before", "to": "after", "mean": after - before, "low": 0.1, "high": 0.5}
    return {
        "dataset": "all", "modality": modality, "structure": structure, "patients": 3, "dsc_change": change,
        "dsc": {"before": before, "after": after}, "nsd": {"before": None, "after": after},
    }  # fmt: skip


@pytest.fixture
def output_folder(tmp_path: Path) -> Path:
    groups = [group("CT", "all", 0.4, 0.8), group("all", "wall", 0.2, 0.9), group("all", "all", 0.3, 0.85)]
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "summary.json").write_text(json.dumps({"groups": groups}))
    (tmp_path / "export").mkdir()
    report = {"iou": 1.0, "clip": "a case", "max_logit_difference": 1e-5}
    (tmp_path / "export" / "verify.json").write_text(json.dumps(report))
    return tmp_path


def test_stages_are_commands_that_exist() -> None:
    for stage in stages(Path("runs/x")):
        program, name, *_ = stage.command.split()
        if program == "medsam2":
            assert name in {command.name for command in COMMANDS}
        else:
            assert program == "python" and (quickstart.REPOSITORY / name).is_file()


def test_each_command_is_echoed_and_timed(capfd: pytest.CaptureFixture[str]) -> None:
    stage = run(Stage("version", "say it", "medsam2 --version"), 1, 2)
    out = capfd.readouterr().out
    assert "[1/2] say it\n$ medsam2 --version\n" in out and out.strip().endswith("0.1.0")
    assert stage["name"] == "version" and stage["seconds"] > 0


def test_failing_stage_stops_with_its_command() -> None:
    with pytest.raises(UserError, match="'models' ended with status 2.*medsam2 models --folder absent"):
        run(Stage("models", "fail", "medsam2 models --folder absent"), 1, 1)


def test_summary_has_times_scores_and_the_exports_difference(
    output_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = build_summary(output_folder, [{"name": "train", "seconds": 60.0}, {"name": "export", "seconds": 5.5}])
    assert summary["seconds"] == 65.5
    assert summary["by_structure"]["wall"]["dsc"] == {"before": 0.2, "after": 0.9}
    assert summary["by_modality"]["CT"]["dsc_change"]["low"] == 0.1
    assert summary["export"]["max_logit_difference"] == 1e-5
    print_summary(summary, output_folder)
    printed = capsys.readouterr().out
    assert "+0.700 (+0.100 to +0.500)" in printed and "report.html" in printed


def test_existing_output_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit):
        quickstart.main(["--output", str(tmp_path)])
    assert "remove it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
