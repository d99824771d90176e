"""Which loggers exist. To add one, add a file here with `NAME` and `make(settings, folder, resumed_step) -> Logger`.

A logger that takes pictures has the method of `TakesPictures`; the others are passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lightning.pytorch.loggers.logger import Logger

from medsam2.errors import did_you_mean
from medsam2.plugins import by_name, modules_of

if TYPE_CHECKING:
    from medsam2.training.pictures import Shown
    from medsam2.training.settings import TrainSettings

ALWAYS = "csv"  # whatever else is asked for, the numbers are on disk


class LoggerKind(Protocol):
    """What a logger's module offers."""

    NAME: str

    def make(self, settings: TrainSettings, folder: Path, resumed_step: int | None) -> Logger:
        """The logger of a run; nothing is written or started before something is logged.

        Args:
            folder: the run folder. resumed_step: the run goes on from there; None: it is new.

        Raises:
            UserError: a package is missing.
        """
        ...


@runtime_checkable
class TakesPictures(Protocol):
    """A logger that shows pictures. Rank 0 alone calls it, after each validation."""

    def log_pictures(self, pictures: Sequence[Shown], step: int) -> None: ...


@cache
def logger_kinds() -> dict[str, LoggerKind]:
    """Every logger by name, one a file of this folder."""
    return by_name(modules_of(__package__, offers="NAME"), "loggers")


def logger_names(asked: Any) -> tuple[str, ...]:
    """The loggers of `logger=`: a name or several, each once, the csv always first.

    Raises:
        ValueError: no such logger.
    """
    names: Iterable[Any] = [asked] if isinstance(asked, str) else asked or ()
    wanted = dict.fromkeys([ALWAYS, *map(str, names)])
    for name in wanted:
        if name not in logger_kinds():
            known = ", ".join(logger_kinds())
            raise ValueError(f"{name!r} is not a logger; known: {known}.{did_you_mean(name, logger_kinds())}")
    return tuple(wanted)


def make_loggers(settings: TrainSettings, folder: Path, resumed_step: int | None) -> list[Logger]:
    """The loggers that `settings.logger` names, in its order."""
    return [logger_kinds()[name].make(settings, folder, resumed_step) for name in settings.logger]
