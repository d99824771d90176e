"""`medsam2 doctor` on every rank of a job: each examines its machine, rank 0 collects, compares and names the silent.

Ranks meet as those of a training run do (torchrun, srun, or RANK, WORLD_SIZE and MASTER_ADDR by hand), at a plain
key-value store: it does not need all of them, so that one which does not come is missed and not waited for.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from medsam2.errors import UserError
from medsam2.training.doctor import Finding, Report

if TYPE_CHECKING:
    from torch.distributed import Store

DONE = "done"
PAUSE = 0.05  # seconds
PREFIX = "medsam2-doctor"  # torchrun keeps keys of its own in the same store


@dataclass(frozen=True)
class Job:
    """The ranks of a job, seen from one of them.

    Attributes:
        hosted: whether the launcher (torchrun) holds the store already, so that rank 0 only joins it.
    """

    rank: int
    world: int
    address: str
    port: int
    hosted: bool = False


def job_of(environment: Mapping[str, str]) -> Job | None:
    """The job that this process is a rank of; None where it runs alone.

    Raises:
        UserError: there are several ranks, but not where rank 0 is.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    elif "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:  # a step: started by srun
        rank, world = (
            int(environment["SLURM_PROCID"]),
            int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")),
        )
    else:
        return None
    if world < 2:
        return None
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if "SLURM_PROCID" in environment and "RANK" not in environment:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "127.0.0.1")
        address = address or SLURMEnvironment.resolve_root_node_address(nodes)
        port = port or str(int(environment.get("SLURM_JOB_ID", "0")[-4:]) + 15000)
    if address is None or port is None:
        raise UserError(
            f"WORLD_SIZE={world} ranks, but MASTER_ADDR and MASTER_PORT do not both say where rank 0 is; give the host "
            "of rank 0 and a free port on it."
        )
    return Job(rank, world, address, int(port), environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


@dataclass(frozen=True)
class Gathered:
    """The reports of the ranks that answered, in order, and the numbers of those that did not."""

    reports: tuple[Report, ...]
    silent: tuple[int, ...] = ()

    @property
    def failed(self) -> bool:
        return bool(self.silent) or any(report.state == "error" for report in self.reports)


def gather(own: Report, job: Job, seconds: float) -> Gathered | None:
    """All reports on rank 0, within `seconds`; None on the others, which wait until rank 0 has them.

    Raises:
        UserError: rank 0 cannot be reached, or its port is taken.
    """
    store = _store(job, seconds)
    end = time.monotonic() + seconds
    if job.rank:
        store.set(f"rank-{job.rank}", json.dumps(own.to_dict()))
        _wait(store, DONE, end + 5)
        return None
    reports, silent = [own], []
    for rank in range(1, job.world):
        if _wait(store, f"rank-{rank}", end):
            reports.append(Report.from_dict(json.loads(store.get(f"rank-{rank}"))))
        else:
            silent.append(rank)
    store.set(DONE, "1")
    time.sleep(0.2)  # the store ends with this process, and the others look for the word in it
    return Gathered(tuple(reports), tuple(silent))


def _store(job: Job, seconds: float) -> Store:
    from torch.distributed import DistError, PrefixStore, TCPStore

    host = job.rank == 0 and not job.hosted
    if not host:
        _reach(job, time.monotonic() + seconds)  # the store itself would print the trace of each attempt
    try:
        store = TCPStore(
            job.address, job.port, None, is_master=host, timeout=timedelta(seconds=seconds), wait_for_workers=False
        )
    except (DistError, RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {job.rank}: no store at {job.address}:{job.port} ({' '.join(str(error).split())[:200]}); another "
            "program has the port: give another MASTER_PORT."
        ) from None
    return PrefixStore(PREFIX, store)


def _reach(job: Job, end: float) -> None:
    """Wait until rank 0 listens.

    Raises:
        UserError: it does not until `end`.
    """
    while True:
        try:
            socket.create_connection((job.address, job.port), timeout=max(end - time.monotonic(), 0.1)).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"rank {job.rank}: cannot reach rank 0 at {job.address}:{job.port} ({error.strerror or error}); is "
                    "it running, does MASTER_ADDR name its host, and does a firewall let the port through?"
                ) from None
            time.sleep(PAUSE)


def _wait(store: Store, key: str, end: float) -> bool:
    """Whether the key comes until `end` (of the monotonic clock); asked for, since a wait that fails prints traces."""
    try:
        while not store.check([key]):
            if time.monotonic() > end:
                return False
            time.sleep(PAUSE)
    except RuntimeError:  # rank 0 has gone with its answer
        return False
    return True


def differences(reports: tuple[Report, ...]) -> list[tuple[str, dict[str, list[int]]]]:
    """Findings that all ranks should share and do not: the name, and the ranks of each value."""
    names = dict.fromkeys(f.name for report in reports for f in report.findings if f.shared)
    found = []
    for name in names:
        values: dict[str, list[int]] = {}
        for report in reports:
            value = next((f.value for f in report.findings if f.name == name), "missing")
            values.setdefault(value, []).append(report.rank)
        if len(values) > 1:
            found.append((name, values))
    return found


def wrong(report: Report) -> list[Finding]:
    return [finding for finding in report.findings if finding.state != "ok"]


def environment_job() -> Job | None:
    return job_of(os.environ)
