"""The processes of one run on one machine: Lightning starts those of ranks 1 and up; we see that they end.

A rank that dies would leave the others waiting in a collective: for seconds with gloo, for many minutes with NCCL. So
rank 0 watches the ranks that it has started, through all phases of a curriculum, and each of them watches rank 0.
Ranks that torchrun or srun have started are watched by those.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from medsam2.training.signals import STATUS, heard

USER_ERROR = 2
GRACE = 5.0  # seconds in which the other ranks may say themselves what is wrong
AT_END = 60.0  # seconds by which ranks may end later than rank 0
POLL = 0.2
RANK_ZERO = "MEDSAM2_RANK_ZERO"  # process number of rank 0, for those that it starts

_ranks: list[subprocess.Popen[bytes]] = []  # of ranks 1, 2, ... that this process has started
_taken_over = threading.Event()  # the main thread deals with the end


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended. status: as `subprocess` gives it, negative for a signal."""

    rank: int
    process: int
    status: int

    @property
    def killed(self) -> bool:
        return self.status < 0

    def __str__(self) -> str:
        if not self.killed:
            return f"rank {self.rank} (process {self.process}) ended with status {self.status}"
        name = signal.Signals(-self.status).name
        memory = "; SIGKILL is also what a machine without memory left sends" if name == "SIGKILL" else ""
        return f"rank {self.rank} (process {self.process}) was ended by {name}{memory}"


# -------------------------------------------------------------------------------------------- rank 0 and the others


class OwnRanks(_SubprocessScriptLauncher):
    """Lightning's launcher; its observer, which would kill this process before that has reported, is left without work.

    A port that was given (MASTER_PORT) and is taken gives way to the next free one.
    """

    def _call_children_scripts(self) -> None:
        if self.num_nodes == 1 and "MASTER_PORT" in os.environ:
            os.environ["MASTER_PORT"] = str(next_free_port(int(os.environ["MASTER_PORT"])))
        os.environ[RANK_ZERO] = str(os.getpid())
        super()._call_children_scripts()
        _ranks[:] = self.procs
        self.procs = []
        _taken_over.clear()
        threading.Thread(target=_watch, daemon=True, name="ranks").start()

    def kill(self, signum: Any) -> None:
        for rank in _ranks:
            if rank.poll() is None:
                rank.send_signal(signum)


def own_ranks(trainer: L.Trainer) -> None:
    """Let ranks that this process is going to start be watched by it."""
    launcher = trainer.strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        own = OwnRanks(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
        trainer.strategy._launcher = own


def next_free_port(first: int) -> int:
    """The first port from `first` on that nothing on this machine listens on; says so where it is another one."""
    for port in range(first, min(first + 100, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
        if port != first:
            print(f"MASTER_PORT={first} is taken on this machine; the ranks meet at {port}", flush=True)
        return port
    return first


def _failed() -> RankEnd | None:
    """The rank that ended badly; one that a signal has ended is the cause of the others' failures."""
    ends = [RankEnd(n, p.pid, p.returncode) for n, p in enumerate(_ranks, 1) if p.poll()]
    ends = [end for end in ends if end.status != STATUS]  # stopped by a signal, as all ranks are
    return min(ends, key=lambda end: not end.killed, default=None)


def _watch() -> None:
    """Thread of rank 0. Where a rank dies and the main thread does not come to know it, that hangs in a collective."""
    while not _taken_over.wait(POLL):
        failed = _failed()
        if failed is not None and not _taken_over.wait(GRACE):
            say(f"{failed}; the others are ended")
            _kill()
            sys.stdout.flush()
            os._exit(USER_ERROR if failed.status == USER_ERROR else 1)


def end_ranks(grace: float = GRACE) -> RankEnd | None:
    """End the ranks that this process started, after it failed itself; the one that failed by itself, if any did.

    A rank notices through its next collective that this one is gone, which with NCCL may take minutes. It gets
    `grace` seconds to say what is wrong, since it may be the one that failed first.
    """
    _taken_over.set()
    _wait(grace)
    failed = _failed()
    _kill()
    return failed


def _wait(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(rank.poll() is None for rank in _ranks):
        time.sleep(POLL / 4)


def _kill() -> None:
    for rank in _ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()
    _ranks.clear()


def say(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


@contextmanager
def owned_ranks() -> Iterator[None]:
    """No rank is left behind, however the run ends; where it ends well, those that are later are waited for."""
    watch_rank_zero()
    try:
        yield
    except BaseException as error:
        end_ranks()
        if type(error) is SIGTERMException:  # of a trainer that only measures
            raise SystemExit(STATUS) from None
        raise
    _wait(AT_END)
    failed = end_ranks(0.0)
    if failed is not None:
        say(f"{failed}, after rank 0 had ended well")
        raise SystemExit(USER_ERROR if failed.status == USER_ERROR else 1)


def watch_rank_zero() -> None:
    """In a rank that rank 0 has started: end when rank 0 is gone, whatever this process waits for."""
    if os.environ.get(RANK_ZERO) != str(os.getppid()):
        return
    parent, rank = os.getppid(), os.environ.get("LOCAL_RANK", "?")

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL)
        time.sleep(GRACE)
        if not heard():
            say(f"rank 0 (process {parent}) is gone; rank {rank} ends too")
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="rank 0").start()
