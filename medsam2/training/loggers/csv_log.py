"""`metrics.csv` in the run folder, always there."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from medsam2.files import atomic_write

NAME, FILE = "csv", "metrics.csv"


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
        return NAME

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
        with atomic_write(self.path, "w") as file:
            writer = csv.DictWriter(file, ["step", *columns])
            writer.writeheader()
            for step, row in sorted(self.rows.items()):
                writer.writerow({"step": step, **{k: repr(v) for k, v in row.items()}})
        self.changed = False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """The figures of each logged step; empty where there is no file yet."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {
            int(row["step"]): {k: float(v) for k, v in row.items() if k != "step" and v not in ("", None)}
            for row in csv.DictReader(file)
        }
