"""The loggers of a run: `metrics.csv` always, and whatever `logger=` names. Any class with a `_target_` may be one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lightning.pytorch.loggers.logger import Logger

from medsam2.errors import UserError
from medsam2.training.loggers.csv_log import FILE, CsvLog

if TYPE_CHECKING:
    from medsam2.training.pictures import Shown
    from medsam2.training.settings import TrainSettings


@runtime_checkable
class TakesPictures(Protocol):
    """A logger that shows pictures. Rank 0 alone calls it, after each validation."""

    def log_pictures(self, pictures: Sequence[Shown], step: int) -> None: ...


def make_loggers(settings: TrainSettings, folder: Path, resumed_step: int | None) -> list[Logger]:
    """The csv, then the loggers of `settings.logger`; nothing is written before something is logged.

    Args:
        resumed_step: the run goes on from there; None: it is new.

    Raises:
        UserError: a class cannot be imported or made; a package may be missing.
    """
    loggers: list[Logger] = [CsvLog(folder / FILE, resumed_step)]
    for name, entry in settings.logger.items():
        from hydra.utils import instantiate

        try:
            loggers.append(instantiate(entry))
        except Exception as error:  # of Hydra, or whatever the class raises
            reason = str(error.__cause__ or error).splitlines()[0]
            raise UserError(f"logger.{name}: {reason}; see configs/logger/ and docs/observability.md.") from None
    return loggers
