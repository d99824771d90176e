"""How a run ends before its last step: what the user is told, and with which status."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from medsam2.errors import UserError
from medsam2.training.limits import explain_worker_limit, is_worker_limit
from medsam2.training.memory import explain_out_of_memory, is_out_of_memory
from medsam2.training.ranks import AT_END, USER_ERROR, RankEnd, end_ranks, own_ranks, say
from medsam2.training.requeue import leave
from medsam2.training.settings import TrainSettings
from medsam2.training.signals import TERMINATE, OwnSignals, heard
from medsam2.training.stopping import Stopped

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def made_to_end_well(trainer: L.Trainer, settings: TrainSettings) -> L.Trainer:
    """The trainer with our handling of signals and ranks, and a limit to how long ranks wait for each other."""
    trainer._signal_connector = OwnSignals()  # type: ignore[assignment]
    own_ranks(trainer)
    if hasattr(trainer.strategy, "_timeout"):
        trainer.strategy._timeout = timedelta(minutes=settings.trainer.timeout_minutes)
    return trainer


def leave_stopped(stopped: SIGTERMException, settings: TrainSettings, rank: int) -> SystemExit:
    """The end of a run that a signal has stopped, once the other ranks have left."""
    end_ranks(AT_END)
    level = stopped.level if isinstance(stopped, Stopped) else max(heard(), TERMINATE)
    status = leave(settings, level, rank)
    if rank == 0:
        print(f"stopped by {stopped}", flush=True)
    return SystemExit(status)


def explained(error: Exception, settings: TrainSettings, trainer: L.Trainer, folder: Path) -> BaseException:
    """What to raise in the place of an error, when no rank is left behind; itself where there is no more to say."""
    failed = end_ranks()
    told = next((found for found in chain(error) if isinstance(found, UserError)), None)
    if told is not None:
        return told  # raised first; what the loggers met on the way out follows from it
    if failed is not None and (failed.killed or failed.status == USER_ERROR):
        return after(failed)
    if is_out_of_memory(error):
        return explain_out_of_memory(error, settings, trainer)
    full = next((found for found in chain(error) if isinstance(found, OSError) and found.errno in FULL), None)
    if full is not None:
        return explain_full_disk(full, folder)
    if settings.data.workers and is_worker_limit(error):
        return explain_worker_limit(settings.data.workers)
    if "EADDRINUSE" in str(error):
        return UserError(
            f"MASTER_PORT={os.environ.get('MASTER_PORT')} is taken on the machine of rank 0; give another one that is "
            "free (MASTER_PORT=29511, torchrun --master-port=29511)."
        )
    return error


def after(failed: RankEnd) -> SystemExit:
    """A rank failed first; where it could, it has told the user itself."""
    if not failed.killed:
        return SystemExit(USER_ERROR)
    say(f"{failed}. The others are ended; go on with resume=auto.")
    return SystemExit(1)


def explain_full_disk(error: OSError, folder: Path) -> UserError:
    where = Path(error.filename) if error.filename else folder
    free = shutil.disk_usage(folder).free
    return UserError(
        f"{where} cannot be written ({error.strerror}): {folder} has {free / 1e6:.1f} MB free. Its checkpoints are "
        "intact; make room, then go on with resume=auto."
    )


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came from, the last one first."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
