"""The code of other programs, started on our exports as their users start it.

`make consumers` puts each program into a folder of its own below build/consumers, with what the tests' own environment
lacks; there it runs with the interpreter of the tests and with its own folder first on the path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

CONSUMERS = Path(__file__).resolve().parents[1] / "build" / "consumers"
SECONDS = 600


def folder_of(name: str) -> Path:
    """Where `make consumers` has put a program; skips the test where it did not."""
    folder = CONSUMERS / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not there: make consumers fetches it (it needs the network once)")
    return folder


def run_program(
    name: str,
    script: Path,
    arguments: Sequence[str | Path] = (),
    request: Mapping[str, np.ndarray] | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """What `script ARGUMENTS... REQUEST.npz ANSWER.npz` answers, in a process that has the program on its path.

    Raises:
        AssertionError: it fails; with what it printed.
    """
    folder = folder_of(name)
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    variables |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **(environment or {})}
    with tempfile.TemporaryDirectory() as place:
        asked, answer = Path(place) / "request.npz", Path(place) / "answer.npz"
        np.savez(asked, **(request or {}))  # type: ignore[arg-type]  # its stub takes the names for options
        command = [sys.executable, "-B", str(script), *map(str, arguments), str(asked), str(answer)]
        done = subprocess.run(
            command, cwd=place, env=variables, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        with np.load(answer, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}


def sam2_checkout(root: Path) -> None:
    """Meta's package in `root`, as in a checkout: programs that read a yaml inside of it start there."""
    spec = find_spec("sam2")
    assert spec and spec.submodule_search_locations
    shutil.copytree(next(iter(spec.submodule_search_locations)), root / "sam2")


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """IoU of two masks."""
    return float((one & other).sum() / (one | other).sum())
