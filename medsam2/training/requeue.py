"""How a stopped run leaves a SLURM job: queued again with status 0, or with 143."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping

from medsam2.training.settings import TrainSettings
from medsam2.training.signals import STATUS, WARNED

SECONDS = 60.0  # scontrol waits for the controller


def wanted(settings: TrainSettings, level: int, environment: Mapping[str, str]) -> bool:
    """Whether the job is to be queued again.

    `auto` requeues on SIGUSR1 alone, the warning ahead of the time limit (`sbatch --signal=USR1@120`): SIGTERM comes
    from scancel, which means the end, or from a preemption, after which SLURM requeues by itself.
    """
    if "SLURM_JOB_ID" not in environment or settings.trainer.requeue is False:
        return False
    return settings.trainer.requeue is True or level == WARNED


def job(environment: Mapping[str, str]) -> str:
    """`123`, or `120_4` of a job array."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"]


def leave(settings: TrainSettings, level: int, rank: int) -> int:
    """The exit status of a rank of a run that was stopped; rank 0 requeues the job before it leaves."""
    if not wanted(settings, level, os.environ):
        return STATUS
    return 0 if rank or requeue(job(os.environ)) else STATUS


def requeue(name: str) -> bool:
    """Ask SLURM to queue a job again; says so, or why it did not work."""
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?", name):
        return _failed(name, "that is not the number of a job")
    try:
        done = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return _failed(name, str(error))
    if done.returncode:
        return _failed(name, done.stderr.strip() or f"status {done.returncode}")
    print(f"job {name} is queued again", flush=True)
    return True


def _failed(name: str, reason: str) -> bool:
    print(
        f"error: SLURM job {name} was not queued again ({reason}); submit it once more, resume=auto goes on.",
        file=sys.stderr,
        flush=True,
    )
    return False
