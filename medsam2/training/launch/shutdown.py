"""How a run ends before its last step: what the user is told, with which status, and that no rank is left behind.

Lightning starts the processes of ranks 1 and up of one machine; we see that they end.
A rank that dies would leave the others waiting in a collective: for seconds with gloo, for many minutes with NCCL. So
rank 0 watches the ranks that it has started, and each of them watches rank 0. Ranks that torchrun or srun have started
are watched by those.
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

import lightning as L
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from medsam2.errors import UserError
from medsam2.training.launch.limits import (
    explain_out_of_memory,
    explain_worker_limit,
    is_out_of_memory,
    is_worker_limit,
)
from medsam2.training.launch.signals import INTERRUPT, TERMINATE, exit_status, heard
from medsam2.training.launch.stopping import Stopped, status_after_stop
from medsam2.training.settings import TrainSettings

USER_ERROR_STATUS = 2
STOPPED_STATUSES = (exit_status(INTERRUPT), exit_status(TERMINATE))
GRACE_SECONDS = 5.0  # in which the other ranks may say themselves what is wrong
AT_END_SECONDS = 60.0  # by which ranks may end later than rank 0
POLL_SECONDS = 0.2
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RANK_ZERO_PID = "MEDSAM2_RANK_ZERO"  # environment variable for the ranks that rank 0 starts

_ranks: list[subprocess.Popen[bytes]] = []  # ranks 1, 2, ... that this process has started
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
    """Lightning's launcher without its observer, which kills this process before that has reported anything.

    The class is private in Lightning, but it is the only place where the processes are known. On one machine the
    ranks meet at a free port, whatever MASTER_PORT says.
    """

    def _call_children_scripts(self) -> None:
        if self.num_nodes == 1:
            os.environ.pop("MASTER_PORT", None)
        os.environ[RANK_ZERO_PID] = str(os.getpid())
        super()._call_children_scripts()
        _ranks[:], self.procs = self.procs, []
        _taken_over.clear()
        threading.Thread(target=_watch, daemon=True, name="ranks").start()


def watch_ranks(trainer: L.Trainer) -> None:
    """Let ranks that this process is going to start be watched by it; Lightning has no public way to say so."""
    launcher = trainer.strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        environment, devices, nodes = launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
        trainer.strategy._launcher = WatchedRanks(environment, devices, nodes)


def _failed_rank() -> RankEnd | None:
    """The rank that ended badly; one that a signal has ended is the cause of the others' failures."""
    ends = [RankEnd(number, p.pid, p.returncode) for number, p in enumerate(_ranks, 1) if p.poll()]
    ends = [end for end in ends if end.status not in STOPPED_STATUSES]
    return min(ends, key=lambda end: not end.killed, default=None)


def _watch() -> None:
    """Thread of rank 0. Where a rank dies and the main thread does not come to know it, that hangs in a collective."""
    while not _taken_over.wait(POLL_SECONDS):
        failed = _failed_rank()
        if failed is not None and not _taken_over.wait(GRACE_SECONDS):
            report_error(f"{failed}; the others are ended")
            _kill()
            os._exit(failed.exit_status)


def end_ranks(grace_seconds: float = GRACE_SECONDS) -> RankEnd | None:
    """End the ranks that this process started, after it failed itself; the one that failed by itself, if any did.

    A rank notices through its next collective that this one is gone, which with NCCL may take minutes. It gets
    `grace_seconds` to say what is wrong, since it may be the one that failed first.
    """
    _taken_over.set()
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
    """One line on stderr, seen even where the process ends at once."""
    sys.stdout.flush()
    print(f"error: {text}", file=sys.stderr, flush=True)


def watch_rank_zero() -> None:
    """In a rank that rank 0 has started: end when rank 0 is gone, whatever this process waits for."""
    parent, rank = os.getppid(), os.environ.get("LOCAL_RANK", "?")
    if os.environ.get(RANK_ZERO_PID) != str(parent):
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        time.sleep(GRACE_SECONDS)
        if not heard():
            report_error(f"rank 0 (process {parent}) is gone; rank {rank} ends too")
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="rank 0").start()


# ---------------------------------------------------------------------------------------------- what the user is told


@contextmanager
def explained_end(settings: TrainSettings, trainer: L.Trainer) -> Iterator[None]:
    """Around `trainer.fit`: a stopped run leaves with its status, an error that the user can mend says how.

    No rank is left behind, however the run ends; where it ends well, those that are later are waited for.
    """
    try:
        yield
    except Stopped as stopped:
        end_ranks(AT_END_SECONDS)
        status = status_after_stop(settings.trainer.requeue, stopped.level, trainer.global_rank)
        if trainer.global_rank == 0:
            print(f"stopped by {stopped}", flush=True)
        raise SystemExit(status) from None
    except Exception as error:
        explanation = to_user_error(error, settings, trainer, Path(settings.output))
        if explanation is error:
            raise
        raise explanation from (error if isinstance(explanation, UserError) else None)
    except BaseException:
        end_ranks()
        raise
    failed = end_ranks(AT_END_SECONDS)
    if failed is not None:
        report_error(f"{failed}, after rank 0 had ended well")
        raise SystemExit(failed.exit_status)


def to_user_error(error: Exception, settings: TrainSettings, trainer: L.Trainer, folder: Path) -> BaseException:
    """What to raise instead of an error, when no rank is left behind; the error itself where there is no more to say.

    The first cause counts: what the loggers met on the way out follows from it.
    """
    failed = end_ranks()
    causes = list(chain(error))
    told = next((cause for cause in causes if isinstance(cause, UserError)), None)
    if told is not None:
        return told
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


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came from, the last one first."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
