"""`medsam2 inspect` as a user types it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from medsam2.cli.inspect import MAX_WARNINGS, inspect
from medsam2.shards.index import read_index, read_summary, write_index

app = typer.Typer()
app.command()(inspect)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def spaced(shards: Path, tmp_path: Path) -> Path:
    """Shards of which every row is there many times, as other cases, with slices 500 mm apart."""
    folder = tmp_path / "spaced"
    shutil.copytree(shards, folder)
    index = read_index(folder)
    rows = []
    for copy in range(4):
        for row in index.table.to_pylist():
            names = {name: f"{row[name][:-1]}{copy}" for name in ("case", "patient", "content_hash", "key")}
            rows.append({**row, **names, "spacing": [500.0, 1.0, 1.0]})
    write_index(folder, rows, read_summary(index.folder))
    return folder


def test_shards_are_shown_by_modality_data_set_and_split(shards: Path):
    result = run(shards)
    assert result.exit_code == 0, result.output
    header = next(line for line in result.stdout.splitlines() if "modality" in line)
    assert all(name in header for name in ("dataset", "split", "patients", "objects", "MB"))
    assert "0 problems" in result.stdout
    assert "every shard has the size that index.json states" in result.stdout


def test_a_warning_names_the_case_and_what_to_do_and_is_no_failure(spaced: Path):
    result = run(spaced)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("warning: extreme spacing: ")]
    case = read_index(spaced).row(0).case
    assert any(f"case {case}: spacing 500 x 1 x 1 mm" in line and "; compare with" in line for line in lines)


def test_no_kind_of_warning_fills_the_terminal(spaced: Path, tmp_path: Path):
    result = run(spaced)
    lines = [line for line in result.stdout.splitlines() if line.startswith("warning: extreme spacing: ")]
    assert len(lines) == MAX_WARNINGS
    assert "... and 23 more of these: see the page (--html FILE)" in result.stdout
    page = tmp_path / "page.html"
    assert "see the page\n" in run(spaced, "--html", page).stdout
    rows = [row["case"] for row in read_index(spaced).table.to_pylist() if row["kind"] == "volume"]
    assert all(case in page.read_text() for case in rows)


def test_a_missing_shard_is_a_failure_and_the_page_is_written_all_the_same(shards: Path, tmp_path: Path):
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    gone = min(folder.glob("*.tar"))
    gone.unlink()
    result = run(folder, "--html", tmp_path / "page.html")
    assert result.exit_code == 1
    assert f"problem: {gone}: missing" in result.stdout
    assert "Problems" in (tmp_path / "page.html").read_text()


def test_raw_data_is_shown_with_layout_and_notes_and_the_page_names_no_case(
    raw_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "160")  # readline sets it in the process that imports it
    page = tmp_path / "page.html"
    result = run(raw_folder, "--html", page)
    assert result.exit_code == 0, result.output
    assert "smith_000" in result.stdout and "nnunet_raw" in result.stdout
    assert "11 cases, all of them readable" in result.stdout
    assert "smith" not in page.read_text()


def test_a_case_that_cannot_be_read_is_named_on_the_terminal_only(tmp_path: Path, write):
    folder = write.nnunet(tmp_path / "Dataset001")
    (folder / "labelsTr" / "smith_002.nii.gz").write_bytes(b"")
    result = run(folder, "--html", tmp_path / "page.html")
    assert result.exit_code == 1
    assert "failed: Dataset001/smith_002: " in result.stdout
    page = (tmp_path / "page.html").read_text()
    assert "cannot be read" in page and "smith" not in page


@pytest.mark.parametrize("url", ["s3://bucket/shards", "https://example.org/shards"])
def test_a_url_is_refused_with_the_remedy(url: str, capfd: pytest.CaptureFixture):
    result = run(url)
    assert result.exit_code == 2
    assert f"{url}: only folders and files on this machine can be inspected; copy it here first" in (
        result.output + capfd.readouterr().err
    )


def test_a_page_that_exists_is_refused_before_anything_is_read(shards: Path, tmp_path: Path, capfd):
    page = tmp_path / "page.html"
    page.write_text("mine")
    result = run(shards, "--html", page)
    assert result.exit_code == 2
    assert "already exists" in result.output + capfd.readouterr().err
    assert page.read_text() == "mine"
    assert "modality" not in result.stdout


def test_cases_stay_a_table_of_whole_numbers_at_80_columns(raw_folder: Path):
    result = CliRunner().invoke(app, [str(raw_folder)], env={"COLUMNS": "80"})
    table = result.stdout[: result.stdout.index("12 x 40 x 48 int16")].splitlines()
    assert all(name in table[1] for name in ("dataset", "case", "shape", "spacing"))
    assert "4 x 1 x 1 mm" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
