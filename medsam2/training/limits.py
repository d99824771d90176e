"""Open files and shared memory, which processes that load data need."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

from medsam2.errors import UserError

SHARED = Path("/dev/shm")
ITSELF, WORKER = 64, 24  # open files of a process that trains, and what each of its workers adds
ENOUGH = 65536
SIGNS = ("bus error", "shared memory", "shm", "too many open files", "ancdata", "errno 24")


def allow_open_files(workers: int) -> None:
    """Raise this process's own limit as far as the system lets it.

    Raises:
        UserError: that is too few for `workers`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    needed = ITSELF + WORKER * workers
    if workers and soft != resource.RLIM_INFINITY and soft < needed:
        raise UserError(
            f"a process may have {soft} files open here, and data.workers={workers} needs about {needed}; raise the "
            f"limit (`ulimit -n 4096`; LimitNOFILE of a service, --ulimit of docker), or give data.workers="
            f"{max(0, (soft - ITSELF) // WORKER)}."
        )


def is_worker_limit(error: BaseException) -> bool:
    """Whether the loader failed for want of shared memory or open files."""
    text = str(error).lower()
    return isinstance(error, OSError | RuntimeError) and any(sign in text for sign in SIGNS)


def explain_worker_limit(workers: int) -> UserError:
    """What to do about it."""
    space = "there is no /dev/shm"
    if SHARED.is_dir():
        usage = shutil.disk_usage(SHARED)
        space = f"{SHARED} has {usage.free / 1e6:.0f} MB free of {usage.total / 1e6:.0f} MB"
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return UserError(
        f"a process that loads data (data.workers={workers}) ran out of shared memory or open files: {space}, and a "
        f"process may have {files} files open. Give the container more (docker run --shm-size=8g or --ipc=host; in "
        "Kubernetes an emptyDir of medium Memory at /dev/shm), raise `ulimit -n`, lower data.workers or "
        "data.clips_per_batch, or load in the process itself by data.workers=0."
    )
