from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import typer
import webdataset
from PIL import Image
from typer.testing import CliRunner, Result

from medsam2.cli.inspect import inspect
from medsam2.cli.prepare import prepare
from medsam2.shards.index import read_index

app = typer.Typer()
app.command()(prepare)
app.command()(inspect)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars of ten stills each, one of them without a mask."""
    folder = tmp_path / "tars"
    folder.mkdir()
    mask = np.zeros((16, 20), np.uint8)
    mask[4:10, 5:12] = 1
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"echo-{number:06d}.tar")) as sink:
            for n in range(10):
                image = np.random.default_rng(100 * number + n).integers(0, 255, (16, 20), np.uint8)
                members = {"png": png(image), "mask.png": png(mask)}
                if (number, n) == (1, 7):
                    del members["mask.png"]
                sink.write({"__key__": f"{number}[red]{n}", **members})
    return folder


def test_the_command_ends_with_tables_and_the_next_command(tars: Path):
    result = run("prepare", tars, "--index-only", "--modality", "US", "--split", "0.5,0.5", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "In the index: 19 samples of 2 tars; skipped: 1 samples; damaged: 0 tars." in result.stdout
    assert "it has no mask" in result.stdout
    assert "echo-000001.tar: 1[red]7" in result.stdout
    assert f"data.shards={tars}" in result.stdout.replace("\n", "")
    assert sorted(set(read_index(tars).table["split"].to_pylist())) == ["train", "val"]
    shown = run("inspect", tars)
    assert shown.exit_code == 0, shown.output
    assert "0 problems" in shown.stdout


def test_an_index_is_replaced_with_force_alone(tars: Path):
    arguments = ("prepare", tars, "--index-only", "--modality", "US", "--workers", 1)
    assert run(*arguments).exit_code == 0
    before = (tars / "index.arrow").read_bytes()
    assert run(*arguments, "--dry-run").exit_code == 0
    again = run(*arguments)
    assert again.exit_code == 2
    assert "already exists; give --force" in again.stderr
    assert (tars / "index.arrow").read_bytes() == before
    forced = run(*arguments[:3], "--modality", "CT", "--workers", 1, "--force")
    assert forced.exit_code == 0, forced.output
    assert set(read_index(tars).table["modality"].to_pylist()) == {"CT"}


def test_a_dry_run_shows_all_and_writes_nothing(tars: Path):
    result = run("prepare", tars, "--index-only", "--modality", "US", "--dry-run", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "19 samples of 2 tars" in result.stdout
    assert "Nothing was written" in result.stdout
    assert sorted(p.suffix for p in tars.iterdir()) == [".tar", ".tar"]


def test_the_same_index_comes_of_one_process_and_of_two(tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("medsam2.shards.pool.BYTES_PER_WORKER", 1)
    arguments = ("prepare", tars, "--index-only", "--modality", "US")
    assert run(*arguments, "--out", tmp_path / "two", "--workers", 2).exit_code == 0
    monkeypatch.undo()
    monkeypatch.setenv("MEDSAM2_SALT", "salt of the tests")
    assert run(*arguments, "--out", tmp_path / "one", "--workers", 1).exit_code == 0
    for name in ("index.arrow", "index.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--codec", "png"], "--codec does not go with --index-only"),
        (["--window", "lung"], "--window does not go with --index-only"),
        (["--remove-patient", "x"], "--remove-patient does not go with --index-only"),
        (["--modality", "MRI"], "--modality 'MRI' is not one of"),
        ([], "give --modality for all"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tars: Path, flags: list[str], said: str):
    result = run("prepare", tars, "--index-only", *flags)
    assert result.exit_code == 2
    assert said in result.stderr
    assert not (tars / "index.arrow").exists()


def test_force_belongs_to_index_only(tars: Path, tmp_path: Path):
    result = run("prepare", tars, "--out", tmp_path / "shards", "--force")
    assert result.exit_code == 2
    assert "--force belongs to --index-only" in result.stderr


def test_rules_that_would_change_masks_are_refused(tars: Path, tmp_path: Path):
    config = tmp_path / "c.yaml"
    config.write_text("datasets: {echo: {modality: US, labels: {rename: {object_1: ventricle}, drop: [x]}}}")
    result = run("prepare", tars, "--index-only", "--config", config)
    assert result.exit_code == 2
    assert "labels.drop does not go with --index-only" in result.stderr
    config.write_text("datasets: {echo: {modality: US, labels: {rename: {object_1: ventricle}}}}")
    result = run("prepare", tars, "--index-only", "--config", config)
    assert result.exit_code == 0, result.output
    summary = json.loads((tars / "index.json").read_text())
    assert {entry["structure"] for entry in summary["structures"]} == {"ventricle"}
