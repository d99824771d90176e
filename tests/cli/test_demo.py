"""`medsam2 demo cases` as a user types it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = "from medsam2.cli.demo import app; app()"


def demo(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_cases_are_written_and_the_next_command_is_named(tmp_path):
    done = demo("cases", "out", "--cases", "1", "--only", "wall", "--modality", "CT", "--modality", "us", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/Dataset001_PhantomCT_wall/dataset.json").is_file()
    assert (tmp_path / "out/phantom_us_wall/meta.json").is_file()
    assert "labels: wall" in done.stdout
    assert "medsam2 prepare out --out out-shards" in done.stdout


def test_an_existing_folder_is_refused_without_a_traceback(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/keep.txt").write_text("mine")
    done = demo("cases", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: out already exists and is not empty") and "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["keep.txt"]


def test_a_misspelt_family_is_answered_with_the_closest(tmp_path):
    done = demo("cases", "out", "--without", "walls", cwd=tmp_path)
    assert done.returncode == 2
    assert "--without 'walls'" in done.stderr and "Did you mean 'wall'" in done.stderr
    assert not (tmp_path / "out").exists()


def test_help_teaches_by_example(tmp_path):
    done = demo("cases", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--only wall" in done.stdout
