"""How a run ends before its last step: what the user is told, and with which status."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from medsam2.errors import UserError
from medsam2.training.limits import explain_worker_limit, is_worker_limit
from medsam2.training.memory import explain_out_of_memory, is_out_of_memory
from medsam2.training.ranks import AT_END_SECONDS, USER_ERROR_STATUS, end_ranks, report_error
from medsam2.training.settings import TrainSettings
from medsam2.training.signals import TERMINATE, heard
from medsam2.training.stopping import Stopped, status_after_stop

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def explained_end(settings: TrainSettings, trainer: L.Trainer) -> Iterator[None]:
    """Around `trainer.fit`: a stopped run leaves with its status, an error that the user can mend says how."""
    try:
        yield
    except SIGTERMException as stopped:
        end_ranks(AT_END_SECONDS)
        level = stopped.level if isinstance(stopped, Stopped) else max(heard(), TERMINATE)
        status = status_after_stop(settings.trainer.requeue, level, trainer.global_rank)
        if trainer.global_rank == 0:
            print(f"stopped by {stopped}", flush=True)
        raise SystemExit(status) from None
    except Exception as error:
        explanation = to_user_error(error, settings, trainer, Path(settings.output))
        if explanation is error:
            raise
        raise explanation from (error if isinstance(explanation, UserError) else None)


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
