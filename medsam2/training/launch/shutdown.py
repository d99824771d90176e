"""End a run early: explain the error, set the exit status, and leave no rank running.

A rank that dies would leave the others waiting in a collective: for seconds with gloo, for many minutes with NCCL. So
rank 0 watches the ranks that Lightning has started on its machine, and each of them watches rank 0. torchrun and srun
watch the ranks that they start.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import lightning as L
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from medsam2.errors import UserError
from medsam2.training.launch.limits import (
    explain_out_of_memory,
    explain_worker_limit,
    is_out_of_memory,
    is_worker_limit,
)
from medsam2.training.launch.signals import INTERRUPT, TERMINATE, exit_status, received_signal
from medsam2.training.launch.stopping import Stopped, status_after_stop
from medsam2.training.settings import TrainSettings

USER_ERROR_STATUS = 2
STOPPED_STATUSES = (exit_status(INTERRUPT), exit_status(TERMINATE))
GRACE_SECONDS = 5.0  # time for the other ranks to report their own error
END_SECONDS = 60.0  # time for the other ranks to end after rank 0
POLL_SECONDS = 0.2
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RANK_ZERO_PID = "MEDSAM2_RANK_ZERO"  # environment variable for the ranks that rank 0 starts

_ranks: list[subprocess.Popen[bytes]] = []  # ranks 1, 2, ... that this process has started
_shutdown_started = threading.Event()  # set once the main thread ends the ranks itself


@dataclass(frozen=True)
class RankEnd:
    """How a rank ended. status: as `subprocess` gives it, negative for a signal."""

    rank: int
    process: int
    status: int

    @property
    def killed(self) -> bool:
        return self.status < 0

    @property
    def exit_status(self) -> int:
        """The status that the whole run ends with."""
        return max(self.status, 1)

    def __str__(self) -> str:
        if not self.killed:
            return f"rank {self.rank} (process {self.process}) ended with status {self.status}"
        name = signal.Signals(-self.status).name
        memory = "; SIGKILL is also what a machine without memory left sends" if name == "SIGKILL" else ""
        return f"rank {self.rank} (process {self.process}) was ended by {name}{memory}"


class WatchedRanks(_SubprocessScriptLauncher):
    """Lightning's launcher without its observer, which kills this process before it can report anything.

    The class is private in Lightning, but no other place knows the processes. On one machine the
    ranks meet at a free port, whatever MASTER_PORT says.
    """

    def _call_children_scripts(self) -> None:
        if self.num_nodes == 1:
            os.environ.pop("MASTER_PORT", None)
        os.environ[RANK_ZERO_PID] = str(os.getpid())
        super()._call_children_scripts()
        _ranks[:], self.procs = self.procs, []
        _shutdown_started.clear()
        threading.Thread(target=_watch, daemon=True, name="ranks").start()


def install_shutdown(trainer: L.Trainer) -> None:
    """Keep our signal handlers, and watch the ranks that this process starts. Lightning has no public way for either.

    Lightning would install its own handlers over ours. Ours stay until the process ends, so that a second signal does
    not interrupt what the first one asked for.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    launcher = trainer.strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        environment, devices, nodes = launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
        trainer.strategy._launcher = WatchedRanks(environment, devices, nodes)


def _failed_rank() -> RankEnd | None:
    """Return the rank that failed; one that a signal killed comes first, since it made the others fail."""
    ends = [RankEnd(number, p.pid, p.returncode) for number, p in enumerate(_ranks, 1) if p.poll()]
    ends = [end for end in ends if end.status not in STOPPED_STATUSES]
    return min(ends, key=lambda end: not end.killed, default=None)


def _watch() -> None:
    """Run in a thread of rank 0: end the run where a rank dies while the main thread hangs in a collective."""
    while not _shutdown_started.wait(POLL_SECONDS):
        failed = _failed_rank()
        if failed is not None and not _shutdown_started.wait(GRACE_SECONDS):
            report_error(f"{failed}; the others are ended")
            _kill()
            os._exit(failed.exit_status)


def end_ranks(grace_seconds: float = GRACE_SECONDS) -> RankEnd | None:
    """End the ranks that this process started, and return the one that failed by itself, if any.

    Each rank has `grace_seconds` to report its own error, since it may have failed first. It would notice only in its
    next collective that this process is gone, which may take minutes with NCCL.
    """
    _shutdown_started.set()
    end = time.monotonic() + grace_seconds
    while time.monotonic() < end and any(rank.poll() is None for rank in _ranks):
        time.sleep(POLL_SECONDS / 4)
    failed = _failed_rank()
    _kill()
    return failed


def _kill() -> None:
    for rank in _ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()
    _ranks.clear()


def report_error(text: str) -> None:
    """Print one line on stderr, flushed so that it appears even if the process ends at once."""
    sys.stdout.flush()
    print(f"error: {text}", file=sys.stderr, flush=True)


def watch_rank_zero() -> None:
    """End this process when rank 0, which started it, is gone, even if it waits in a collective."""
    parent, rank = os.getppid(), os.environ.get("LOCAL_RANK", "?")
    if os.environ.get(RANK_ZERO_PID) != str(parent):
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        time.sleep(GRACE_SECONDS)
        if not received_signal():
            report_error(f"rank 0 (process {parent}) is gone; rank {rank} ends too")
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="rank 0").start()


# ------------------------------------------------------------------------------------------- explaining the end


@contextmanager
def clean_shutdown(settings: TrainSettings, trainer: L.Trainer) -> Iterator[None]:
    """Wrap `trainer.fit`: exit with the status of a stopped run, and explain errors that the user can correct.

    No rank is left running, however the run ends. After a successful run rank 0 waits for the ranks that end later.

    Raises:
        SystemExit: the run was stopped by a signal, or another rank failed.
        UserError: the user can correct the error.
    """
    try:
        yield
    except Stopped as stopped:
        exit_after_signal(stopped, settings, trainer)
    except Exception as error:
        explanation = to_user_error(error, settings, trainer, Path(settings.output))
        if explanation is error:
            raise
        raise explanation from (error if isinstance(explanation, UserError) else None)
    except BaseException:
        end_ranks()
        raise
    failed = end_ranks(END_SECONDS)
    if failed is not None:
        report_error(f"{failed}, after rank 0 had ended well")
        raise SystemExit(failed.exit_status)


def exit_after_signal(stopped: Stopped, settings: TrainSettings, trainer: L.Trainer) -> NoReturn:
    """Exit with the status that torchrun and SLURM expect of a stopped run, after the other ranks have ended."""
    end_ranks(END_SECONDS)
    status = status_after_stop(settings.trainer.requeue, stopped.level, trainer.global_rank)
    if trainer.global_rank == 0:
        print(f"stopped by {stopped}", flush=True)
    raise SystemExit(status) from None


def to_user_error(error: Exception, settings: TrainSettings, trainer: L.Trainer, folder: Path) -> BaseException:
    """End the other ranks, and return what to raise instead of `error`; `error` itself where nothing explains it.

    The first cause is explained: errors of the loggers during shutdown only follow from it.
    """
    failed = end_ranks()
    causes = list(cause_chain(error))
    user_error = next((cause for cause in causes if isinstance(cause, UserError)), None)
    if user_error is not None:
        return user_error
    if failed is not None and failed.killed:
        report_error(f"{failed}. The others are ended; go on with resume=auto.")
    if failed is not None and (failed.killed or failed.status == USER_ERROR_STATUS):  # the rank has told the user
        return SystemExit(failed.exit_status)
    if is_out_of_memory(error):
        return explain_out_of_memory(error, settings, trainer)
    full = next((cause for cause in causes if isinstance(cause, OSError) and cause.errno in DISK_FULL), None)
    if full is not None:
        return UserError(
            f"{full.filename or folder} cannot be written ({full.strerror}): {folder} has "
            f"{shutil.disk_usage(folder).free / 1e6:.1f} MB free. Its checkpoints are intact; make room, then go on "
            "with resume=auto."
        )
    if settings.data.workers and is_worker_limit(error):
        return explain_worker_limit(settings.data.workers)
    if "EADDRINUSE" in str(error):
        return UserError(
            f"MASTER_PORT={os.environ.get('MASTER_PORT')} is taken on the machine of rank 0; give another one that is "
            "free (MASTER_PORT=29511, torchrun --master-port=29511)."
        )
    return error


def cause_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes, the latest first."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
