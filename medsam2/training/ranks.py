"""The processes of one run on one machine: Lightning starts those of ranks 1 and up; we see that they end."""

from __future__ import annotations

import subprocess
import time

import lightning as L

USER_ERROR = 2
GRACE = 5.0


def end_ranks(trainer: L.Trainer, grace: float = GRACE) -> int | None:
    """End the ranks that this process started, after it failed itself; the status of one that failed by itself.

    A rank notices through its next collective that this one is gone, which with NCCL may take minutes. It gets
    `grace` seconds to say what is wrong, since it may be the one that failed first.
    """
    launched: list[subprocess.Popen[bytes]] = getattr(trainer.strategy.launcher, "procs", [])
    ranks = list(launched)
    launched.clear()  # Lightning's observer watches this list, and would kill this process before it has reported
    end = time.monotonic() + grace
    while time.monotonic() < end and any(rank.poll() is None for rank in ranks):
        time.sleep(0.05)
    failed = next((rank.returncode for rank in ranks if rank.poll()), None)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()
    return failed
