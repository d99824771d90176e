from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import typer
from typer.testing import CliRunner, Result

from medsam2.cases.layouts import find_cases
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


def configuration(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "index.json").read_text())["configuration"]
    return found


def test_what_was_found_is_shown_before_it_is_read(raw_folder: Path, tmp_path: Path):
    result = run("prepare", raw_folder, "--out", tmp_path / "shards", "--workers", 1)
    assert "Dataset001_Test, nnunet_raw, CT: 4 cases\n" in result.stdout
    assert "scope, video_masks, ENDOSCOPY: 2 cases\n" in result.stdout


def test_options_reach_the_shards(raw_folder: Path, tmp_path: Path):
    out = tmp_path / "shards"
    arguments = ["--layout", "nnunet_raw", "--codec", "png", "--split", "0.5,0.5", "--seed", 3, "--window", "-1350:150"]
    more = ["--max-side", 32, "--min-pixels", 30, "--workers", 1, "--licence", "CC0", "--source-name", "a hospital"]
    result = run("prepare", raw_folder, "--out", out, *arguments, *more)
    assert result.exit_code == 0, result.output
    expected = {"codec": "png", "max_side": 32, "seed": 3, "split": {"train": 0.5, "val": 0.5}}
    assert configuration(out) | expected == configuration(out)
    common = {"window": [-1350.0, 150.0], "min_pixels": 30, "licence": "CC0", "source": "a hospital"}
    assert configuration(out)["settings"]["common"] == common
    summary = json.loads((out / "index.json").read_text())
    assert {entry["structure"] for entry in summary["structures"]} == {"organ"}


def test_flags_that_are_repeated_and_a_yaml_come_together(raw_folder: Path, tmp_path: Path):
    config = tmp_path / "prepare.yaml"
    config.write_text("axis: x\nlabels: {rename: {organ: liver}}\ndatasets: {echo: {axis: z}}\n")
    out = tmp_path / "shards"
    windows = ["--window", "abdomen", "--window", "lung", "--instances", "lesion", "--instances", "organ"]
    flags = ["--axis", "y", "--min-voxels", 2, "--patient", "(?P<patient>smith_00[01]|.+)", "--allow-gaps"]
    result = run("prepare", raw_folder / "Dataset001_Test", "--out", out, "--config", config, *windows, *flags)
    assert result.exit_code == 0, result.output
    assert configuration(out)["settings"] == {
        "common": {
            "axis": "y",
            "windows": ["abdomen", "lung"],
            "min_voxels": 2,
            "patient": "(?P<patient>smith_00[01]|.+)",
            "allow_gaps": True,
            "labels": {"rename": {"organ": "liver"}, "instances": ["lesion", "organ"]},
        },
        "datasets": {"echo": {"axis": "z"}},
    }


def test_added_cases_are_refused_and_patients_are_left_out_by_name(tmp_path: Path, write, capfd: pytest.CaptureFixture):
    write.nnunet(tmp_path / "raw" / "Dataset001")
    out = tmp_path / "shards"
    assert "4 cases were prepared" in run("prepare", tmp_path / "raw", "--out", out).stdout
    write.davis(tmp_path / "raw" / "echo")
    result = run("prepare", tmp_path / "raw", "--out", out)
    assert result.exit_code == 2
    assert "2 added (echo/" in result.output + capfd.readouterr().err
    (tmp_path / "names.txt").write_text("".join(f"{ref.patient_id}\n" for ref in find_cases(tmp_path / "raw" / "echo")))
    result = run("prepare", tmp_path / "raw", "--out", out, "--exclude-patients", tmp_path / "names.txt")
    assert result.exit_code == 0, result.output
    assert "2 cases of --exclude-patients are left out" in result.stdout and "complete already" in result.stdout


def test_a_url_is_a_target_like_any_other(raw_folder: Path, tmp_path: Path):
    url = f"memory://{uuid4()}/shards"
    result = run("prepare", raw_folder, "--out", url, "--staging", tmp_path)
    assert result.exit_code == 0, result.output
    assert f"data.shards={url}" in result.stdout.replace("\n", "")
    assert "complete already" in run("prepare", raw_folder, "--out", url).stdout


def test_a_patient_is_taken_out_of_the_shards_by_name(tmp_path: Path, write):
    write.nnunet(tmp_path / "raw" / "Dataset001")
    out = tmp_path / "shards"
    run("prepare", tmp_path / "raw", "--out", out)
    result = run("prepare", "--out", out, "--remove-patient", "smith_001", "--remove-patient", "smith_002")
    assert result.exit_code == 0, result.output
    assert "2 cases (" in result.stdout


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dry_run_in_processes_prints_the_same(
    raw_folder: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
):
    here = run("prepare", raw_folder, "--out", tmp_path / "shards", "--dry-run").stdout
    monkeypatch.setattr("medsam2.shards.prepare.pool.BYTES_PER_WORKER", 1)
    assert run("prepare", raw_folder, "--out", tmp_path / "s", "--dry-run", "--workers", workers).stdout == here


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
        (["--window", "100:-100"], "window '100:-100': the lower bound must be below"),
        (["--axis", "w"], "--axis='w': "),
        (["--channels", "all"], "--channels='all': "),
        (["--patient", "(smith)"], r"--patient='(smith)': needs a group (?P<patient>...)"),
        (["--config", "missing.yaml"], "--config missing.yaml: no such file"),
        (["--dask", "nonsense"], "--dask nonsense: no scheduler answers"),
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
    assert not list((tmp_path / "shards").rglob("*.part"))


def test_a_missing_source_or_target_is_told(raw_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    for arguments, match in ((["--out", tmp_path / "s"], "SOURCE is missing"), ([raw_folder], "--out is missing")):
        result = run("prepare", *arguments)
        assert result.exit_code == 2
        assert match in result.output + capfd.readouterr().err


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
    assert "11 cases, all of them readable" in raw.stdout
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
