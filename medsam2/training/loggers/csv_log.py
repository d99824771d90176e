"""The csv files of a run folder, and the logger of `metrics.csv`, which every run has."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from medsam2.files import atomic_write

FILE = "metrics.csv"


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a csv file as text, which keeps every digit; empty where there is no file yet."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a csv file; floats have all their digits, and a column that a row lacks is empty."""
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


class CsvLog(Logger):
    """One row a logged step, full precision; it goes on after a resume instead of being deleted.

    Rows of steps after the resumed one (logged by the run that was interrupted) are dropped when it is opened.
    """

    def __init__(self, path: Path, resumed_step: int | None = None) -> None:
        super().__init__()
        self.path = path
        self.changed = False
        self.rows: dict[int, dict[str, float]] = {}
        if resumed_step is not None:
            self.rows = {step: row for step, row in read_metrics(path).items() if step <= resumed_step}

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = self.rows.setdefault(int(step or 0), {})
        row.update({k: float(v) for k, v in metrics.items() if k != "epoch"})
        self.changed = True

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is in config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        if not self.changed:  # a run that logged nothing, such as a refused resume, takes nothing away
            return
        columns = sorted({key for row in self.rows.values() for key in row})
        write_rows(self.path, ["step", *columns], ({"step": step, **row} for step, row in sorted(self.rows.items())))
        self.changed = False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """The figures of each logged step."""
    return {
        int(row["step"]): {name: float(text) for name, text in row.items() if name != "step" and text}
        for row in read_rows(path)
    }
