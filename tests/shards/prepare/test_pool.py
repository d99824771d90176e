"""Cases in this process, in processes, and on a local Dask cluster; workers that die."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from medsam2.errors import UserError
from medsam2.shards.prepare import pool
from medsam2.shards.prepare.pool import Workers, choose_workers
from medsam2.shards.prepare.run import PrepareOptions, prepare

WORK = '''
import os, signal, time
from pathlib import Path

def double(number):
    return 2 * number

def double_unless_13(number):
    """What a case does that needs more memory than there is."""
    if number == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return 2 * number

def full(number):
    raise OSError(28, "No space left on device", "somewhere.part")

def sleep_in(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)
'''


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """Functions that a spawned process can import."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "pool_work.py").write_text(WORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", str(folder))
        yield importlib.import_module("pool_work")


@pytest.fixture(scope="module")
def cluster(work: ModuleType) -> Iterator[Any]:
    """Two Dask worker processes of this machine."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    ) as cluster:
        yield cluster


@pytest.mark.parametrize("count", [0, 2])
def test_every_case_comes_back_with_its_result(work: ModuleType, count: int):
    assert dict(Workers(count).run(work.double, range(20))) == {n: 2 * n for n in range(20)}


def test_a_case_that_kills_its_worker_costs_that_case_alone(work: ModuleType):
    results = dict(Workers(2).run(work.double_unless_13, range(20)))
    assert results == {n: None if n == 13 else 2 * n for n in range(20)}


def test_an_error_of_the_target_ends_the_run_as_it_is(work: ModuleType):
    with pytest.raises(OSError, match="No space left") as caught:
        dict(Workers(1).run(work.full, range(3)))
    assert caught.value.filename == "somewhere.part"


def test_workers_go_with_a_parent_that_is_killed(work: ModuleType, tmp_path: Path):
    script = (
        "import sys, pool_work\nfrom medsam2.shards.prepare.pool import Workers\n"
        "if __name__ == '__main__':\n"
        "    list(Workers(2).run(pool_work.sleep_in, [sys.argv[1]] * 4))\n"
    )
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "seen").mkdir()
    process = subprocess.Popen([sys.executable, tmp_path / "script.py", tmp_path / "seen"])
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "seen").iterdir())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    workers = [int(p.name) for p in (tmp_path / "seen").iterdir()]
    while any(map(_runs, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Ref:
    files: list[Path]


def test_little_data_is_read_in_this_process_and_much_by_no_more_than_pay_off(tmp_path: Path):
    for number in range(4):
        with open(tmp_path / str(number), "wb") as file:
            file.truncate(20 << 20)
    refs: Any = [Ref([tmp_path / str(number)]) for number in range(4)]
    assert choose_workers(refs[:1], 8) == Workers()
    assert [choose_workers(refs, most).processes for most in (8, 2, 1)] == [3, 2, 1]
    folder: Any = Ref([tmp_path, tmp_path / "missing"])
    assert choose_workers([folder], 8) == Workers(1)
    assert choose_workers(refs, 8, "tcp://somewhere:8786") == Workers(dask="tcp://somewhere:8786")


def test_a_dask_cluster_writes_the_same_shards(cluster: Any, tmp_path: Path, raw_folder: Path, shards: Path):
    result = prepare(raw_folder, tmp_path / "out", PrepareOptions(dask=cluster.scheduler_address))
    assert result.num_cases == 11
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in shards.iterdir()
    }


def test_relative_paths_hold_for_workers_elsewhere(
    cluster: Any, tmp_path: Path, write, monkeypatch: pytest.MonkeyPatch
):
    write.nnunet(tmp_path / "raw" / "Dataset001")
    monkeypatch.chdir(tmp_path)
    options = PrepareOptions(dask=cluster.scheduler_address, staging=Path("shared"))
    assert prepare("raw", "out", options).num_cases == 4
    assert list((tmp_path / "shared").iterdir()) == []


@pytest.mark.slow
def test_a_case_that_kills_dask_workers_costs_that_case_alone(cluster: Any, work: ModuleType):
    results = dict(Workers(dask=cluster.scheduler_address).run(work.double_unless_13, range(10, 16)))
    assert results == {n: None if n == 13 else 2 * n for n in range(10, 16)}


def test_a_staging_folder_that_is_not_shared_is_told(
    cluster: Any, tmp_path: Path, raw_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("medsam2.shards.prepare.run.part_path", lambda folder, job: tmp_path / "elsewhere" / job.case)
    with pytest.raises(UserError, match="--staging .*share under the same path"):
        prepare(raw_folder, tmp_path / "out", PrepareOptions(dask=cluster.scheduler_address))


def test_workers_with_several_threads_read_one_case_at_a_time(work: ModuleType):
    distributed = pytest.importorskip("distributed")
    running = []

    def overlapping(number: int) -> int:
        running.append(number)
        time.sleep(0.05)
        seen = len(running)
        running.remove(number)
        return seen

    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=3, processes=False, dashboard_address=":0", silence_logs=50
    ) as cluster:
        assert {seen for _, seen in Workers(dask=cluster.scheduler_address).run(overlapping, range(4))} == {1}


def test_a_scheduler_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(pool, "CONNECT_SECONDS", 1.0)
    for address in ("tcp://127.0.0.1:9", "nonsense"):
        with pytest.raises(UserError, match=f"--dask {address}: no scheduler answers .*dask scheduler"):
            list(Workers(dask=address).run(_slow, range(3)))


def test_a_scheduler_without_workers_is_an_error_that_says_how_to_start_some(monkeypatch: pytest.MonkeyPatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(pool, "CONNECT_SECONDS", 1.0)
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=":0", silence_logs=50) as empty,
        pytest.raises(UserError, match="no scheduler with workers answers .*start workers with `dask worker"),
    ):
        list(Workers(dask=empty.scheduler_address).run(_slow, range(3)))


def test_a_scheduler_that_is_lost_ends_the_run_and_keeps_what_is_done(work: ModuleType):
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0", silence_logs=50
    )
    with pytest.raises(UserError, match="the scheduler is lost .*finished cases are reused"):
        for done, _ in enumerate(Workers(dask=cluster.scheduler_address).run(_slow, range(30))):
            if done == 2:
                cluster.close(timeout=1)


def _slow(number: int) -> int:
    time.sleep(0.1)
    return number


def test_dask_that_is_not_installed_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r'pip install "medsam2\[dask\]"'):
        list(Workers(dask="tcp://somewhere:8786").run(_slow, range(3)))
