"""`report.html` in the run folder: one page that tells what a run did, made from what the run has written.

It is written after a validation (at most once a minute), at the end, however the run ends, and at any time by

    python -m medsam2.training.report RUN
"""

from __future__ import annotations

import base64
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from medsam2.errors import UserError, explain_errors
from medsam2.evaluation.overlays import PREDICTIONS, PROMPT, TRUTH
from medsam2.evaluation.tables import Table
from medsam2.files import atomic_write
from medsam2.training.events import BEGIN, END, WARNING, Event, course, note, read_events, seconds_of
from medsam2.training.log import VALIDATION, read_validation
from medsam2.training.loggers.csv_log import FILE as METRICS
from medsam2.training.loggers.csv_log import read_metrics
from medsam2.training.pictures import FOLDER as PICTURES
from medsam2.training.pictures import Kept, read_pictures
from medsam2.training.report_curves import Metrics, draw_curves, series
from medsam2.training.tradeoff import START
from medsam2.training.validation import StructureRow

FILE = "report.html"
PAUSE = 60.0  # seconds between two pages of a run that goes on
KEPT = {
    "val/gain": "gain: DSC on new data", "val/retention": "retention: DSC on old data",
    "val/obedience": "boxes that are obeyed", "val/obedience_far_click": "far clicks that are obeyed",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a run folder says about its run; empty where it says nothing.

    Attributes:
        config, environment: as written when training began last. metrics: by step. start: `start_scores.json`.
    """

    folder: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: Metrics
    validation: Sequence[StructureRow]
    pictures: Sequence[Kept]
    start: Mapping[str, float]
    events: Sequence[Event]

    @property
    def last_step(self) -> int:
        """Optimiser steps done; a step is logged with the number that it begins at."""
        trained = [step + 1 for step, row in self.metrics.items() if "train/loss" in row]
        return max([*trained, *(row.step for row in self.validation)], default=0)

    @property
    def best_step(self) -> int | None:
        """Steps done at the validation with the highest mean DSC; it is logged with the last of them, from 0 on."""
        steps, values = series(self.metrics, "val/dsc")
        return steps[values.index(max(values))] + 1 if values else None


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: there is no run in it.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder} holds no config.yaml: it is not a run folder, or its training never began.")
    return Run(
        folder,
        yaml.safe_load(config.read_text(encoding="utf-8")) or {},
        _json(folder / "environment.json"),
        read_metrics(folder / METRICS),
        read_validation(folder / VALIDATION),
        read_pictures(folder / PICTURES),
        _json(folder / "start_scores.json"),
        read_events(folder),
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_report(folder: Path) -> Path:
    """Write the page of a run; returns its path.

    Raises:
        UserError: there is no run in the folder.
    """
    from jinja2 import Environment

    from medsam2.training.report_page import TEMPLATE

    run = read_run(folder)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    content = environment.from_string(TEMPLATE).render(
        title=folder.resolve().name,
        lead=lead(run),
        facts=facts(run),
        warnings=warnings(run),
        curves=base64.b64encode(draw_curves(run.metrics)).decode(),
        tables=validation_tables(run),
        kept=kept_table(run),
        clips=clips(run),
        colours={"truth": TRUTH, "prediction": PREDICTIONS[0], "prompt": PROMPT},
        events=event_table(run.events),
        config=yaml.safe_dump(dict(run.config), sort_keys=False),
        environment=json.dumps(run.environment, indent=2),
    )
    path = folder / FILE
    with atomic_write(path, "w") as file:
        file.write(content)
    return path


# ------------------------------------------------------------------------------------------------------ the head


def lead(run: Run) -> str:
    """What was trained, from what, with what, where."""
    config, environment = run.config, run.environment
    model, trainer = config.get("model", {}), config.get("trainer", {})
    shards = config.get("data", {}).get("shards")
    names = [Path(str(one)).name for one in (shards if isinstance(shards, list | tuple) else [shards])]
    ranks = environment.get("ranks", 1)
    where = f"{ranks} ranks, {environment.get('device')}" if ranks > 1 else environment.get("device", "")
    adaptation = config.get("adaptation", {})
    how = ", ".join(adaptation.get("train", ())) + (" and adapters" if adaptation.get("peft") else "")
    parts = [
        f"{model.get('name')} at {model.get('image_size')} pixels from {Path(str(config.get('start'))).name}",
        f"trained: {how.removeprefix(' and ')}" if how else "",
        f"data {', '.join(names)}",
        f"seed {config.get('seed')}",
        f"{trainer.get('precision')}" + (" deterministic" if trainer.get("deterministic") else ""),
        where,
        f"torch {environment.get('versions', {}).get('torch', '?')}",
    ]
    return " · ".join(part for part in parts if part)


def state(run: Run) -> str:
    """finished, stopped, failed, killed or running."""
    marks = course(run.events)
    if not marks or marks[-1].kind == BEGIN:
        return "running"
    return marks[-1].text.split(" ")[0].replace("ended", "failed")


def facts(run: Run) -> list[dict[str, str]]:
    """The figures at the head of the page."""
    scores = series(run.metrics, "val/dsc")[1]
    pace, waited = (series(run.metrics, f"train/{name}")[1] for name in ("clips_per_second", "data_wait"))
    memory = series(run.metrics, "train/memory_gb")[1]
    losses = series(run.metrics, "train/loss")[1]
    tail = max(len(losses) // 10, 1)
    ranks = run.environment.get("ranks", 1)
    begins = sum(event.kind == BEGIN for event in run.events)
    found = [
        (state(run), "state"),
        (f"{run.last_step} of {run.config.get('trainer', {}).get('max_steps', '?')}", "steps"),
        (duration(seconds_of(list(run.events))), "time" + (f", {begins - 1} interruptions" if begins > 1 else "")),
    ]
    if scores:
        found += [(f"{max(scores):.3f}", f"best DSC, step {run.best_step}"), (f"{scores[-1]:.3f}", "DSC at the end")]
    if losses:
        first, last = mean(losses[:tail]), mean(losses[-tail:])
        found.append((f"{first:.2f} → {last:.2f}", "loss, first and last tenth"))
    if pace:
        found.append((f"{mean(pace) * ranks:.2f}", "clips a second"))
        found.append((f"{mean(waited):.0%}", "of the time waiting for data"))
    if memory:
        on_gpu = not str(run.environment.get("device", "CPU")).startswith("CPU")
        found.append((f"{max(memory):.1f} GB", "most memory, GPU" if on_gpu else "most memory, process"))
    return [{"value": value, "name": name} for value, name in found]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def signed(change: float) -> str:
    """`+0.012`; never `-0.000`."""
    return f"{round(change, 3) + 0.0:+.3f}"


def duration(seconds: float) -> str:
    """`2 h 5 min`, `3 min 20 s`, `12 s`."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def warnings(run: Run) -> list[str]:
    """What makes the run less than it seems: skipped steps, lost segments, a bad end, and what was noted."""
    found = []
    skipped = series(run.metrics, "train/skipped")[1]
    if skipped and skipped[-1]:
        kept = sorted(path.name for path in (run.folder / "bad").glob("*-rank-*.safetensors"))
        where = f" Batches for replay are in bad/: {', '.join(kept)}." if kept else ""
        found.append(f"{skipped[-1]:.0f} steps were skipped: loss or gradient was not finite.{where}")
    lost = series(run.metrics, "data/lost")[1]
    if lost and lost[-1]:
        found.append(f"{lost[-1]:.0f} damaged or missing segments were replaced by other clips.")
    waited = series(run.metrics, "train/data_wait")[1]
    if mean(waited) > 0.3:
        found.append(f"{mean(waited):.0%} of the time was spent waiting for data; give more data.workers.")
    marks = course(run.events)
    if marks and marks[-1].kind == END and marks[-1].text != "finished":
        found.append(f"The run has {marks[-1].text}.")
    return found + list(dict.fromkeys(sentence(event.text) for event in run.events if event.kind == WARNING))


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


# ---------------------------------------------------------------------------------------------------- the tables


def validation_tables(run: Run) -> list[Table]:
    """A table for each protocol: the DSC of each modality and structure at the first, best and last validation."""
    steps = sorted({row.step for row in run.validation})
    if not steps:
        return []
    best = run.best_step if run.best_step in steps else None
    columns = [(steps[0], "first")] if len(steps) > 1 else []
    columns += [(best, "best")] if best is not None and len(steps) > 1 else []
    columns += [(steps[-1], "last")]
    protocols = dict.fromkeys(row.protocol for row in run.validation)
    return [one_table(name, [row for row in run.validation if row.protocol == name], columns) for name in protocols]


def one_table(title: str, rows: Sequence[StructureRow], columns: Sequence[tuple[int, str]]) -> Table:
    found = {(row.step, row.data, row.modality, row.structure): row for row in rows}
    groups = dict.fromkeys((row.data, row.modality, row.structure) for row in rows)
    lines = []
    for group in groups:
        cells = [found.get((step, *group)) for step, _ in columns]
        newest = next(cell for cell in (*reversed(cells), *rows) if cell is not None)
        data, modality, structure = group
        change = signed(cells[-1].dsc - cells[0].dsc) if len(cells) > 1 and cells[0] and cells[-1] else ""
        scores = [f"{cell.dsc:.3f}" if cell else "" for cell in cells]
        lines.append((modality, structure + (" (general)" if data != "own" else ""), str(newest.cases),
                      str(newest.objects), *scores, *([change] if len(columns) > 1 else [])))  # fmt: skip
    heads = [f"{name}\nstep {step}" for step, name in columns]
    header = ("modality", "structure", "cases", "objects", *heads, *(["change"] if len(columns) > 1 else []))
    return Table(title, header, tuple(lines), texts=2)


def kept_table(run: Run) -> Table | None:
    """Start and now of what `retention.py` measures; None where nothing was."""
    lines = []
    for key, name in KEPT.items():
        values = series(run.metrics, key)[1]
        begin = run.start.get(key + START)
        if values and begin is not None:
            lines.append((name, f"{begin:.3f}", f"{values[-1]:.3f}", signed(values[-1] - begin)))
    return Table("Kept", ("", "start", "now", "change"), tuple(lines)) if lines else None


def event_table(events: Sequence[Event]) -> Table:
    lines = tuple((f"{event.time:%Y-%m-%d %H:%M:%S} UTC", event.kind, event.text) for event in events)
    return Table("Events", ("time", "", "what"), lines, texts=3)


def clips(run: Run) -> list[dict[str, Any]]:
    """The kept pictures of each clip, in the order of the steps, embedded."""
    groups: dict[tuple[str, str, str, int], list[Kept]] = {}
    for row in run.pictures:
        groups.setdefault((row.modality, row.structure, row.case, row.object), []).append(row)
    steps = sorted({row.step for row in run.pictures})
    scores = {row.step: row.score for row in run.pictures}
    best = max(steps, key=lambda step: (scores[step] == scores[step], scores[step], -step), default=0)
    found = []
    for (modality, structure, case, _), rows in groups.items():
        strips = []
        for row in rows:
            path = run.folder / PICTURES / row.file
            if path.is_file():
                data = base64.b64encode(path.read_bytes()).decode()
                label = f"step {row.step}" + (", best" if row.step == best and len(steps) > 1 else "")
                strips.append({"data": data, "dsc": f"{row.dsc:.3f}", "label": label})
        many = "still" if rows[0].frames == 1 else f"{rows[0].frames} frames"
        found.append({"title": f"{modality} {structure}, case {case[:8]}, {many}", "strips": strips})
    return found


# --------------------------------------------------------------------------------------------------- the callback


class RunReport(Callback):
    """Writes the page as the run goes, and at its end. A page that cannot be written never ends a run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.written = folder, time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if time.monotonic() - self.written > PAUSE and not trainer.sanity_checking:
            self.write(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.write(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.write(trainer)

    @rank_zero_only
    def write(self, trainer: L.Trainer) -> None:
        try:
            for logger in trainer.loggers:
                logger.save()
            if (self.folder / METRICS).is_file():
                write_report(self.folder)
        except Exception as error:  # a full disk, say: that is told of where something is lost by it
            note(self.folder, WARNING, f"report.html could not be written: {error}")
        self.written = time.monotonic()


@explain_errors
def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("usage: python -m medsam2.training.report RUN")
    print(write_report(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
