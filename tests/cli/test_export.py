"""`medsam2 export` as a user types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medsam2.cli.export import export as command
from medsam2.errors import UserError


def export(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medsam2.cli.main", "export", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_formats_go_into_a_folder_each(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = export("-c", "nano", "--to", "sam2", "--to", "huggingface", "-o", str(out), "--no-verify", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["huggingface", "sam2"]
    assert "medsam2_nano_128.pt" in done.stdout and "model.safetensors" in done.stdout
    assert "Not verified" in (out / "sam2" / "README.md").read_text()
    again = export("-c", "nano", "-o", str(out))
    assert again.returncode == 2 and again.stderr.startswith("error: ") and "Traceback" not in again.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": ["all,sam2"]}, "--to all is every format"),
        ({"to": ["hugging"]}, "is not one of adapter, .*all.*Did you mean 'huggingface'"),
        ({"verify": False, "case": "shards"}, "compares nothing"),
        ({"dtype": "fp16"}, "is not one of fp32, bf16"),
        ({"weights": "raw"}, "one set of weights"),
        ({"image_size": 100}, "not a multiple of 32"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        command("nano", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
