"""The root of the `medsam2` command, as a user types it."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from medsam2 import __version__
from medsam2.cli.main import COMMANDS, build_app
from medsam2.config import compose

ROOT = Path(__file__).resolve().parents[2]


def medsam2(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "medsam2.cli.main", *arguments], capture_output=True, text=True, timeout=120, cwd=cwd
    )


def test_help_answers_quickly_and_teaches_by_example() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = medsam2("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0, "CPU seconds, whatever else runs"
    assert done.returncode == 0 and "$ medsam2 demo cases" in done.stdout
    for command in COMMANDS:
        assert command.name in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from medsam2.cli.main import main
try:
    main(["--help"])
except SystemExit:
    pass
heavy = {"torch", "numpy", "hydra", "pandas", "SimpleITK", "sam2", "lightning"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)


TYPED = [command.name if command.name != "demo" else "demo cases" for command in COMMANDS]


@pytest.mark.parametrize("name", TYPED)
def test_every_sub_command_has_help_with_an_example_and_needs_no_torch_for_it(name: str) -> None:
    code = f"""
import sys
from medsam2.cli.main import main
try:
    main([*{name.split()!r}, "--help"])
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"medsam2 {name}" in done.stdout.replace("Usage: medsam2", ""), f"no example in the help of {name}"


@pytest.mark.parametrize("name", TYPED)
def test_examples_can_be_copied_as_they_are_printed(name: str) -> None:
    """Square brackets are markup to the help's printer: an example that holds a list would lose it."""
    code = f"""
import os
os.environ["COLUMNS"] = "300"
from medsam2.cli.main import main
main([*{name.split()!r}, "--help"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    command = next(command for command in COMMANDS if command.name == name.split()[0])
    path = ROOT.joinpath(*command.target.split(":")[0].split(".")).with_suffix(".py")
    written = re.findall(r"^ +\$ (.+)$", path.read_text(), flags=re.MULTILINE)
    shown = [" ".join(line.split()) for line in done.stdout.splitlines()]
    missing = [line for line in written if not any(" ".join(line.replace("\\[", "[").split()) in one for one in shown)]
    assert not missing and (written or name == "demo cases"), done.stdout


def test_misspelt_command_gets_the_closest_one() -> None:
    done = medsam2("exprt")
    assert done.returncode == 2 and "'export'" in done.stderr


def test_version_is_printed() -> None:
    assert medsam2("--version").stdout.strip() == __version__


def test_sub_commands_that_were_not_asked_for_are_only_listed() -> None:
    app = build_app(["models"])
    assert [command.name for command in app.registered_commands if command.name == "models"]
    assert "medsam2.cli.models" in sys.modules


def test_models_says_what_is_on_disk_and_where_meta_publishes(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "sam2.1_hiera_tiny.pt").touch()
    done = medsam2("models", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "checkpoints/" in done.stdout and "092824/sam2.1_hiera_large.pt" in done.stdout
    (command,) = (line for line in done.stdout.splitlines() if "train.py" in line)
    composed = compose("train", command.split("train.py ")[1].split())
    assert composed["model"]["name"] == "hiera_tiny" and Path(composed["start"]).name == "sam2.1_hiera_tiny.pt"


def test_models_refuses_a_folder_that_is_not_there() -> None:
    done = medsam2("models", "--folder", "absent")
    assert done.returncode == 2 and done.stderr.startswith("error: --folder absent")
