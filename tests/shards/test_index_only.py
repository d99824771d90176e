from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import typer
import webdataset
from PIL import Image
from typer.testing import CliRunner, Result

from medsam2.cli.inspect import inspect
from medsam2.cli.prepare import prepare

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
    """Two tars of ten stills each."""
    folder = tmp_path / "tars"
    folder.mkdir()
    mask = np.zeros((16, 20), np.uint8)
    mask[4:10, 5:12] = 1
    note = {"dataset": "echo", "modality": "US", "split": "train", "labels": {"1": "ventricle"}}
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"echo-{number:06d}.tar")) as sink:
            for n in range(10):
                image = np.random.default_rng(100 * number + n).integers(0, 255, (16, 20), np.uint8)
                key = f"{number}[red]{n}"
                sink.write({"__key__": key, "png": png(image), "mask.png": png(mask), "json": {**note, "patient": key}})
    return folder


def test_the_command_says_what_it_found_and_the_next_command(tars: Path):
    dry = run("prepare", tars, "--index-only", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "Nothing was written" in dry.stdout
    assert sorted(p.suffix for p in tars.iterdir()) == [".tar", ".tar"]
    result = run("prepare", tars, "--index-only", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "echo, US, train: 20 patients, 20 cases, 20 segments, 20 objects, 20 frames" in result.stdout
    assert f"data.shards={tars}" in result.stdout.replace("\n", "")
    shown = run("inspect", tars)
    assert shown.exit_code == 0, shown.output
    assert "0 problems" in shown.stdout


def test_an_index_is_replaced_with_force_alone(tars: Path):
    arguments = ("prepare", tars, "--index-only")
    assert run(*arguments).exit_code == 0
    before = (tars / "index.arrow").read_bytes()
    again = run(*arguments)
    assert again.exit_code == 2
    assert "exists; give --force" in again.stderr
    assert run(*arguments, "--force").exit_code == 0
    assert (tars / "index.arrow").read_bytes() == before


@pytest.mark.parametrize("flags", [["--codec", "png"], ["--window", "lung"], ["--split", "0.8,0.2"], ["--out", "x"]])
def test_flags_that_mean_nothing_here_are_refused(tars: Path, flags: list[str]):
    result = run("prepare", tars, "--index-only", *flags)
    assert result.exit_code == 2
    assert f"{flags[0]} cannot be used with --index-only" in result.stderr
    assert not (tars / "index.arrow").exists()


def test_force_belongs_to_index_only(tars: Path, tmp_path: Path):
    result = run("prepare", tars, "--out", tmp_path / "shards", "--force")
    assert result.exit_code == 2
    assert "--force applies only to --index-only" in result.stderr
