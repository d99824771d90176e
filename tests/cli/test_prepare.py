from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from medsam2.cli.inspect import inspect
from medsam2.cli.prepare import prepare

app = typer.Typer()
app.command()(prepare)
app.command()(inspect)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_prepare_ends_with_a_table_and_the_next_command(raw_folder: Path, tmp_path: Path):
    result = run("prepare", raw_folder, "--out", tmp_path / "shards", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "Dataset001_Test" in result.stdout
    assert f"data.shards={tmp_path / 'shards'}" in result.stdout.replace("\n", "")
    again = run("prepare", raw_folder, "--out", tmp_path / "shards", "--workers", 1)
    assert again.exit_code == 0
    assert "complete already" in again.stdout


def test_options_reach_the_shards(raw_folder: Path, tmp_path: Path):
    out = tmp_path / "shards"
    arguments = ["--layout", "nnunet_raw", "--codec", "png", "--split", "0.5,0.5", "--seed", 3, "--window", "-1350:150"]
    more = ["--max-side", 32, "--min-pixels", 30, "--workers", 1]
    assert run("prepare", raw_folder, "--out", out, *arguments, *more).exit_code == 0
    summary = json.loads((out / "index.json").read_text())
    expected = {"codec": "png", "window": [-1350.0, 150.0], "max_side": 32, "min_pixels": 30, "seed": 3}
    assert summary["configuration"] | expected == summary["configuration"]
    assert {entry["structure"] for entry in summary["structures"]} == {"organ"}


def test_a_dry_run_lists_cases_and_errors_and_writes_nothing(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001")
    (folder / "labelsTr" / "smith_002.nii.gz").write_bytes(b"")
    result = run("prepare", folder, "--out", tmp_path / "shards", "--dry-run")
    assert result.exit_code == 0
    assert "smith_000" in result.stdout
    assert "smith_002.nii.gz: the file is empty" in result.stdout.replace("\n", "")
    assert "4 cases, 1 of them cannot be read" in result.stdout
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--codec", "zst"], "Did you mean 'zstd'"),
        (["--window", "abdomn"], "Did you mean 'abdomen'"),
        (["--split", "0.9,0.9"], "add up to 1"),
        (["--layout", "davis"], "Did you mean 'davis_frames'"),
    ],
)
def test_wrong_options_get_one_line_with_the_closest(
    raw_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture, arguments: list[str], match: str
):
    result = run("prepare", raw_folder, "--out", tmp_path / "shards", *arguments)
    assert result.exit_code == 2
    assert match in result.output + capfd.readouterr().err
    assert not (tmp_path / "shards").exists()


def test_failed_cases_are_named_on_the_terminal(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001")
    (folder / "labelsTr" / "smith_002.nii.gz").write_bytes(b"")
    result = run("prepare", folder, "--out", tmp_path / "shards", "--workers", 1)
    assert result.exit_code == 0
    assert "failed: Dataset001/smith_002" in result.stdout
    assert "failures.jsonl" in result.stdout


def test_inspect_shows_raw_data_and_shards_and_writes_a_page(raw_folder: Path, shards: Path, tmp_path: Path):
    raw = run("inspect", raw_folder)
    assert raw.exit_code == 0
    assert "11 cases, 0 of them cannot be read" in raw.stdout
    page = tmp_path / "page.html"
    result = run("inspect", shards, "--html", page)
    assert result.exit_code == 0
    assert "instrument" in result.stdout
    assert page.stat().st_size > 10_000
    assert run("inspect", shards, "--html", page).exit_code == 2


def test_inspect_ends_with_an_error_where_something_is_wrong(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001")
    (folder / "labelsTr" / "smith_002.nii.gz").write_bytes(b"")
    assert run("inspect", folder).exit_code == 1
