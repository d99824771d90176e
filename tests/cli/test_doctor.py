"""`medsam2 doctor`: what it says of this machine, of broken ones, and of every rank of a job."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_disk import small_disk

from medsam2.errors import UserError
from medsam2.training.doctor import (
    GIB,
    Finding,
    Place,
    Report,
    State,
    _kernels,
    _no_gpu,
    cpu_quota,
    descriptors,
    examine,
    judge_descriptors,
    judge_disk,
    judge_shared_memory,
    network,
    requirements,
)
from medsam2.training.doctor_ranks import Job, differences, gather, job_of

NAMES = ("medsam2", "python", "torch", "requirements", "cores", "memory", "shared memory", "descriptors",
         "output folder", "TMPDIR", "cache of shards", "ports", "interfaces")  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def doctor(*arguments: str, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "medsam2.cli.main", "doctor", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**more)
    )  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("doctor")
    report = examine(Place(folder, folder / "not" / "made"))
    assert not list(folder.iterdir())  # what is tried is removed, and nothing is made
    return report


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# ---------------------------------------------------------------------------------------------- one machine


def test_everything_is_looked_at_and_said_with_what_mends_it(here: Report) -> None:
    found = {finding.name: finding for finding in here.findings}
    assert set(NAMES) <= set(found)
    assert all(finding.advice for finding in here.findings if finding.state != "ok")
    assert found["requirements"].state == "ok"
    assert not any("could not be looked at" in finding.advice for finding in here.findings)


def test_the_report_survives_json(here: Report) -> None:
    assert Report.from_dict(json.loads(json.dumps(here.to_dict()))) == here


def test_few_descriptors_are_an_error_with_status_one_and_json(tmp_path: Path) -> None:
    command = f'ulimit -Sn 128; exec "{sys.executable}" -m medsam2.cli.main doctor --json --folder "{tmp_path}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["state"] == "error" and report["silent"] == [] and len(report["ranks"]) == 1
    found = {finding["name"]: finding for finding in report["ranks"][0]["findings"]}
    assert found["descriptors"]["state"] == "error" and found["descriptors"]["advice"].startswith("ulimit -n")


@pytest.mark.parametrize(
    ("soft", "hard", "state", "remedy"),
    [(1024, 4096, "ok", ""), (512, 4096, "warning", "ulimit -n 4096"), (64, 64, "error", "nofile=65536")],
)
def test_descriptors_are_judged_by_what_workers_need(soft: int, hard: int, state: State, remedy: str) -> None:
    found = judge_descriptors(soft, hard)
    assert found.state == state and remedy in found.advice
    assert next(descriptors(Place())).value.endswith("files may be open")


@pytest.mark.parametrize(("free", "state"), [(8 * GIB, "ok"), (GIB, "warning"), (64 << 20, "error")])
def test_dockers_own_shared_memory_is_an_error(free: int, state: State) -> None:
    found = judge_shared_memory(free, free)
    assert found.state == state and ("--shm-size=8g" in found.advice) == (state != "ok")


def test_a_small_disk_is_an_error_and_is_left_as_it_was(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        found = judge_disk("output folder", disk / "runs" / "first")
        assert found.state == "error" and "make room" in found.advice and not list(disk.iterdir())


def test_a_full_disk_is_not_writable(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "100k") as disk:
        found = judge_disk("TMPDIR", disk)
        assert found.state == "error" and "not writable (No space left on device)" in found.value
        assert not list(disk.iterdir())


def test_a_master_that_is_not_known_and_an_interface_that_is_not_here_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    found = {finding.name: finding for finding in network(Place())}
    assert found["MASTER_ADDR"].state == "error" and "node of rank 0" in found["MASTER_ADDR"].advice
    assert found["NCCL_SOCKET_IFNAME"].state == "error" and "lo" in found["NCCL_SOCKET_IFNAME"].advice
    assert "GLOO_SOCKET_IFNAME" not in found


def test_a_requirement_that_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["numpy>=99", "no-such-package-7", "pydantic>=2", 'nothing; extra == "dev"']
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needed)
    (found,) = requirements(Place())
    assert found.state == "error" and "numpy>=99 (found: 2" in found.value
    assert "no-such-package-7 (found: missing)" in found.value and "pydantic" not in found.value


def test_a_driver_without_a_gpu_for_torch_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "built for CUDA 13.0" in _no_gpu("470.1", "13.0").advice
    assert "for CPUs" in _no_gpu("470.1", None).advice
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is empty" in _no_gpu("470.1", "13.0").advice


@pytest.mark.parametrize(
    ("capability", "state", "said"),
    [((9, 0), "ok", "flash attention yes"), ((7, 5), "warning", "16-mixed"), ((6, 1), "error", "kernels from 7.0 on")],
)
def test_old_gpus_are_told_which_precision_they_can(capability: tuple[int, int], state: State, said: str) -> None:
    found = _kernels(0, capability, ["sm_70", "sm_80", "sm_90a", "compute_90"])
    assert found.state == state and said in found.value + found.advice


@pytest.mark.parametrize(("text", "cores"), [("max 100000", None), ("150000 100000", 1.5), ("", None)])
def test_a_containers_share_of_the_cores_is_read(tmp_path: Path, text: str, cores: float | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota(tmp_path / "cpu.max") == cores


def test_a_probe_that_fails_is_a_finding_and_the_others_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def odd_machine(place: Place) -> Iterator[Finding]:
        raise PermissionError("no")

    monkeypatch.setattr("medsam2.training.doctor.PROBES", (odd_machine, descriptors))
    first, second = examine(Place()).findings
    assert (first.name, first.state) == ("odd machine", "warning") and second.name == "descriptors"


# ---------------------------------------------------------------------------------------------------- ranks


def test_the_job_is_found_where_torchrun_srun_or_hands_started_it() -> None:
    hands = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
    assert job_of(hands) == Job(1, 4, "a", 7)
    assert job_of({**hands, "TORCHELASTIC_USE_AGENT_STORE": "True"}) == Job(1, 4, "a", 7, hosted=True)
    slurm = {"SLURM_PROCID": "2", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_ID": "0",
             "SLURM_JOB_ID": "81234", "SLURM_NODELIST": "node[03-05]"}  # fmt: skip
    assert job_of(slurm) == Job(2, 3, "node03", 16234)
    assert job_of({**slurm, "SLURM_STEP_NUM_TASKS": "1"}) is None
    del slurm["SLURM_STEP_ID"]  # in the batch script itself, without srun
    assert job_of(slurm) is None and job_of({}) is None
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT"):
        job_of({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a"})


@contextmanager
def other_ranks(port: int, reports: dict[int, Report], world: int) -> Iterator[None]:
    """Ranks 1 and up as threads, each with its own report."""
    ranks = [
        threading.Thread(target=gather, args=(report, Job(rank, world, "127.0.0.1", port), 20))
        for rank, report in reports.items()
    ]
    for rank in ranks:
        rank.start()
    yield
    for rank in ranks:
        rank.join(20)
        assert not rank.is_alive()


def test_rank_zero_compares_and_names_the_one_that_is_silent(here: Report) -> None:
    other = Report("b", 1, (Finding("torch", "1.0", shared=True), Finding("memory", "2 GiB free", "warning", "more")))
    port = free_port()
    with other_ranks(port, {1: other}, 3):
        found = gather(here, Job(0, 3, "127.0.0.1", port), 4)
    assert found is not None and found.failed
    assert [report.rank for report in found.reports] == [0, 1] and found.silent == (2,)
    assert found.reports[1] == other
    values = dict(differences(found.reports))
    assert values["torch"]["1.0"] == [1] and values["medsam2"]["missing"] == [1] and "memory" not in values


def test_a_rank_that_cannot_reach_rank_zero_says_so_in_time() -> None:
    port = free_port()
    with pytest.raises(UserError, match=rf"rank 1: cannot reach rank 0 at 127.0.0.1:{port} \(Connection refused\)"):
        gather(Report("b", 1, ()), Job(1, 2, "127.0.0.1", port), 0.5)


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"no store at 127.0.0.1:{port}.*another MASTER_PORT"):
            gather(Report("a", 0, ()), Job(0, 2, "127.0.0.1", port), 2)


def test_two_processes_of_a_job_print_one_table(tmp_path: Path) -> None:
    more = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [doctor("--folder", str(tmp_path), "--timeout", "60", RANK=str(rank), **more) for rank in (0, 1)]
    (first, errors), (second, _) = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], first + errors
    assert first.count("2 ranks") == 1 and "are the same on all ranks" in first and not second
