"""`medsam2 import` as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medsam2.model.build import ModelSpec, build_sam


def medsam2(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medsam2.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_wrapped_checkpoint_is_named_written_and_verified(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = tmp_path / "weights.pt"
    torch.save(
        {f"module.{key}": value for key, value in build_sam(ModelSpec("hiera_nano")).state_dict().items()}, source
    )
    done = medsam2("import", str(source), "--image-size", "64", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "found SAM 2.1 hiera_nano at 64 px (Meta's names)" in done.stdout
    assert "note: a bare state dict" in done.stdout and "'module.'" in done.stdout
    assert "verified with Meta's code" in done.stdout
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", "medsam2_nano_64.pt", "medsam2_nano_64.yaml", "verify.json"]


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cut.pt").write_bytes(b"PK")
    done = medsam2("import", str(tmp_path / "cut.pt"), "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_it_is_listed_among_the_commands() -> None:
    assert "import" in medsam2("--help").stdout
