"""A port that is taken, few open files, a small /dev/shm: advice, not a hang or a bus error."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import ROOT, command, finish, start
from small_shards import build

from medsam2.errors import UserError
from medsam2.training.launch.limits import PROCESS_FILES, WORKER_FILES, allow_open_files
from medsam2.training.launch.shutdown import to_user_error


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSAM2_SALT", "salt of the tests")
        return build(tmp_path_factory.mktemp("limits") / "shards")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which something else listens."""
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.slow
def test_ranks_of_one_machine_meet_at_another_port_where_the_given_one_is_taken(
    shards: Path, tmp_path: Path, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_PORT", str(taken))
    done = finish(start(shards, tmp_path / "run", 2, "trainer.max_steps=1"))
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_port_that_cannot_be_changed_is_named_in_the_error(
    tmp_path: Path, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun or srun have told it to all ranks. The error is torch's own."""
    from torch.distributed import DistNetworkError, TCPStore

    monkeypatch.setenv("MASTER_PORT", str(taken))
    with pytest.raises(DistNetworkError) as met:
        TCPStore("127.0.0.1", taken, 1, is_master=True)
    settings = _settings(workers=0)
    with pytest.raises(UserError, match=rf"MASTER_PORT={taken} is taken"):
        raise to_user_error(met.value, settings, None, tmp_path)  # type: ignore[arg-type]


def _settings(workers: int) -> object:
    from medsam2.config import validate
    from medsam2.training.settings import TrainSettings

    return validate(TrainSettings, {"data": {"shards": "x", "workers": workers}, "output": "y"}, "the test")


@pytest.mark.slow
def test_few_open_files_give_advice_before_the_run_begins(shards: Path, tmp_path: Path) -> None:
    words = command(shards, tmp_path / "run", 1, "data.workers=2")
    done = subprocess.run(["bash", "-c", 'ulimit -n 64 && exec "$@"', "-", *words], capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "run").exists(), done.stderr[-3000:]
    assert "may have 64 files open here" in done.stderr and "ulimit -n 4096" in done.stderr
    assert "data.workers=0" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (50, 300));"
        "from medsam2.training.launch.limits import allow_open_files; allow_open_files(2);"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "(300, 300)"


def test_workers_are_limited_to_what_the_open_files_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (PROCESS_FILES + 3 * WORKER_FILES,) * 2)
    allow_open_files(3)
    with pytest.raises(UserError, match=r"data\.workers=3\.$"):
        allow_open_files(4)


SMALL_SHM = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'


@pytest.mark.slow
def test_a_small_shared_memory_gives_advice_in_the_place_of_a_bus_error(shards: Path, tmp_path: Path) -> None:
    """In a mount namespace of its own, where that is allowed."""
    allowed = ["unshare", "--mount", "bash", "-c", SMALL_SHM, "-"]
    try:
        if subprocess.run([*allowed, "true"], capture_output=True).returncode:
            pytest.skip("a mount namespace is not permitted here")
    except OSError:
        pytest.skip("there is no unshare")
    large = ("data.workers=2", "data.clips_per_batch=64", "data.clip_frames=3")
    words = command(shards, tmp_path / "run", 1, *large)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run([*allowed, *words], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "ran out of shared memory" in done.stderr and "--shm-size" in done.stderr
    assert "data.workers=0" in done.stderr
