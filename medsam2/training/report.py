"""`report.html` in the run folder: one page about a run, made from the files that the run has written.

`log.RunReport` writes it after a validation (at most once a minute), and at the end, however the run ends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from medsam2.cases.case import MODALITIES
from medsam2.errors import UserError
from medsam2.reporting.curves import Diagram, Line, draw_diagrams, to_svg
from medsam2.reporting.page import Block, Code, Facts, Folded, Heading, Note, Page, Picture, Section, write_page
from medsam2.reporting.style import PREDICTIONS, PROMPT, TRUTH
from medsam2.reporting.tables import MISSING, Cell, Table, numbers, words
from medsam2.training.callbacks.pictures import CLIP, TABLE
from medsam2.training.callbacks.pictures import FOLDER as PICTURES
from medsam2.training.callbacks.validation import OBEDIENCE, START, VALIDATION
from medsam2.training.loggers.csv_log import FILE as METRICS
from medsam2.training.run_folder.events import BEGIN, END, WARNING, Event, course, is_running, read_events, run_seconds

FILE = "report.html"
HIGH_DATA_WAIT = 0.3  # share of the time
COMPARED_WITH_START = {
    "val/gain": "gain: DSC on new data",
    "val/retention": "retention: DSC on old data",
    OBEDIENCE: "boxes that are obeyed",
}
LOSS_PARTS = ("focal", "dice", "iou", "presence", "distillation")
PROMPT_TITLES = {"dense": "damaged mask"}
OUTLINES = (("ground truth", TRUTH), ("prediction", PREDICTIONS[0]), ("box", PROMPT))


@dataclass(frozen=True, eq=False)
class Run:
    """The files of a run folder; empty where there is none.

    Attributes:
        config, environment: as written when training began last. metrics: metrics.csv by step.
        validation, pictures: rows of validation.csv and pictures.csv. start: `start_scores.json`.
    """

    folder: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: pd.DataFrame
    validation: pd.DataFrame
    pictures: pd.DataFrame
    start: Mapping[str, float]
    events: Sequence[Event]

    def series(self, name: str) -> pd.Series:
        """The finite values of a column of metrics.csv by step."""
        values = self.metrics.get(name, pd.Series(dtype=float))
        return values[np.isfinite(values)]

    @property
    def last_step(self) -> int:
        """Optimiser steps done; a step is logged with the number that it begins at."""
        return int(max([0, *(self.series("train/loss").index[-1:] + 1), *self.validation["step"]]))

    @property
    def best_step(self) -> int | None:
        """Steps done at the validation with the highest mean DSC; it is logged with the last of them, from 0 on."""
        scores = self.series("val/dsc")
        return int(scores.idxmax()) + 1 if len(scores) else None


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: there is no run in it.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder} holds no config.yaml: it is not a run folder, or its training never began.")
    metrics = folder / METRICS
    return Run(
        folder,
        yaml.safe_load(config.read_text(encoding="utf-8")) or {},
        _json(folder / "environment.json"),
        pd.read_csv(metrics, index_col="step").sort_index() if metrics.is_file() else pd.DataFrame(),
        read_table(folder / VALIDATION),
        read_table(folder / PICTURES / TABLE),
        _json(folder / "start_scores.json"),
        read_events(folder),
    )


def read_table(path: Path) -> pd.DataFrame:
    """The rows of validation.csv or pictures.csv; without a file there are none.

    Names stay text, also where all of them are numbers or one is "nan"; scores may be unknown.
    """
    names = ("protocol", "data", "modality", "structure", "case", "file")
    if not path.is_file():
        return pd.DataFrame(columns=["step", "object", *names])
    unknown = dict.fromkeys(("dsc", "score"), ["", "nan"])
    return pd.read_csv(path, dtype=dict.fromkeys(names, str), keep_default_na=False, na_values=unknown)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_report(folder: Path) -> Path:
    """Write the page of a run; returns its path.

    Raises:
        UserError: there is no run in the folder.
    """
    run = read_run(folder)
    head: list[Block] = [Note(line, "warning") for line in warnings(run)]
    settings = (
        Folded("config.yaml", (Code(yaml.safe_dump(dict(run.config), sort_keys=False)),)),
        Folded("environment.json", (Code(json.dumps(run.environment, indent=2)),)),
    )
    sections = [
        Section("", (*head, Facts(tuple(facts(run))))),
        Section("Curves", tuple(curve_blocks(run))),
        Section("Validation", tuple(validation_blocks(run))),
        Section("Pictures", tuple(picture_blocks(run))),
        Section("Events", (event_table(run.events),)),
        Section("Configuration", settings),
    ]
    write_page(folder / FILE, Page(folder.resolve().name, lead(run), sections))
    return folder / FILE


# ------------------------------------------------------------------------------------------------------ the head


def lead(run: Run) -> str:
    """What was trained, on which data, with what, and where."""
    config, environment = run.config, run.environment
    model, trainer, adaptation, data = (config.get(name, {}) for name in ("model", "trainer", "adaptation", "data"))
    names = [Path(location).name for location in data.get("shards", ())]
    trained = [*adaptation.get("train", ()), *(["adapters"] if adaptation.get("peft") else [])]
    return " · ".join([
        f"{model.get('name')} at {model.get('image_size')} pixels from {Path(str(config.get('start'))).name}",
        f"trained: {', '.join(trained)}",
        f"data {', '.join(names)}",
        f"seed {config.get('seed')}, {trainer.get('precision')}",
        f"{environment.get('ranks', 1)} × {environment.get('device')}",
        f"torch {environment.get('versions', {}).get('torch')}",
    ])  # fmt: skip


def state(run: Run) -> str:
    """finished, stopped, failed, killed or running."""
    events = course(run.events)
    if not events or is_running(events):
        return "running"
    return events[-1].text.split(" ")[0].replace("ended", "failed")


def facts(run: Run) -> Iterator[tuple[str, str]]:
    """(value, name) of the figures at the head of the page."""
    scores, losses, memory = (run.series(name) for name in ("val/dsc", "train/loss", "train/memory_gb"))
    begins = sum(event.kind == BEGIN for event in run.events)
    yield state(run), "state"
    yield f"{run.last_step} of {run.config.get('trainer', {}).get('max_steps', '?')}", "steps"
    yield duration(run_seconds(run.events)), "time" + (f", {begins - 1} interruptions" if begins > 1 else "")
    if len(scores):
        yield f"{scores.max():.3f}", f"best DSC, step {run.best_step}"
        yield f"{scores.iloc[-1]:.3f}", "DSC at the end"
    if len(losses):
        tenth = max(len(losses) // 10, 1)
        yield f"{losses[:tenth].mean():.2f} → {losses[-tenth:].mean():.2f}", "loss, first and last tenth"
    if len(pace := run.series("train/clips_per_second")):
        yield f"{pace.mean() * run.environment.get('ranks', 1):.2f}", "clips per second"
        yield f"{run.series('train/data_wait').mean():.0%}", "of the time waiting for data"
    if len(memory):
        on_cpu = str(run.environment.get("device", "CPU")).startswith("CPU")
        yield f"{memory.max():.1f} GB", "peak memory, process" if on_cpu else "peak memory, GPU"


def duration(seconds: float) -> str:
    """`2 h 5 min`, `3 min 20 s`, `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def warnings(run: Run) -> list[str]:
    """Skipped steps, lost segments, waiting for data, a bad end, and what was noted."""
    lines = []
    if skipped := run.series("train/skipped").max() > 0 and run.series("train/skipped").iloc[-1]:
        lines.append(f"{skipped:.0f} steps were skipped: loss or gradient was not finite.")
    if lost := run.series("data/lost").max() > 0 and run.series("data/lost").iloc[-1]:
        lines.append(f"{lost:.0f} damaged or missing segments were replaced by other clips.")
    if (waited := run.series("train/data_wait").mean()) > HIGH_DATA_WAIT:
        lines.append(f"{waited:.0%} of the time was spent waiting for data; give more data.workers.")
    events = course(run.events)
    if events and events[-1].kind == END and events[-1].text != "finished":
        lines.append(f"The run has {events[-1].text}.")
    noted = [event.text for event in run.events if event.kind == WARNING]
    return lines + [text[:1].upper() + text[1:] + "." * (not text.endswith(".")) for text in dict.fromkeys(noted)]


# ---------------------------------------------------------------------------------------------------- the curves


def curve_blocks(run: Run) -> Iterator[Block]:
    """All curves in one picture."""
    if charts := diagrams(run):
        yield Note("Against optimiser steps. Faint: logged values; strong: a running mean.")
        yield Picture(
            to_svg(draw_diagrams(charts)), kind="svg+xml", alt="Curves of losses, scores, rates and throughput"
        )


def diagrams(run: Run) -> list[Diagram]:
    """Every diagram that has something to show."""
    kinds = [name for name in run.metrics if name.startswith("train/loss_")]
    kind_names = {PROMPT_TITLES.get(name[11:], name[11:]): name for name in kinds}
    scores = {"mean": "val/dsc", **{modality: f"val/{modality}/dsc" for modality in MODALITIES}}
    scores |= {"retention": "val/retention", "obeyed boxes": "val/obedience"}

    def diagram(title: str, names: Mapping[str, str], **options: Any) -> Diagram:
        lines = []
        for label, name in names.items():
            values = run.series(name)
            start = [run.start[name + START]] if name + START in run.start else []
            if len(values):
                lines.append(Line(label, [*([0] * len(start)), *values.index], [*start, *values]))
        return Diagram(title, tuple(lines), **options)

    charts = [
        diagram("Loss", {"training": "train/loss", "validation clips": "val/loss"}, smooth=True),
        diagram("Loss by part, unweighted", {part: f"train/{part}" for part in LOSS_PARTS}, smooth=True, log=True),
        diagram("Loss by kind of prompt", kind_names, smooth=True),
        diagram("Validation DSC", scores, markers=True, limits=(0, 1)),
        diagram("Learning rate", rates(run)),
        diagram("Gradient norm before clipping", {"": "train/grad_norm"}, smooth=True, log=True),
        diagram("Clips per second of each rank", {"": "train/clips_per_second"}, smooth=True),
        diagram("Share of the time spent waiting for data", {"": "train/data_wait"}, smooth=True, limits=(0, 1)),
    ]
    return [diagram for diagram in charts if diagram.lines]


def rates(run: Run) -> dict[str, str]:
    """One column of each learning rate, by the parts of the model that have it.

    A column `lr-AdamW/image_encoder/3` is of the fourth group of parameters of the image encoder.
    """
    groups: dict[tuple[float, ...], list[str]] = {}
    for column in run.metrics.filter(regex="^lr-"):
        groups.setdefault(tuple(run.series(column)), []).append(column)
    return {
        ", ".join(dict.fromkeys([*name.split("/"), name.removeprefix("lr-")][1] for name in same)): same[0]
        for same in groups.values()
    }


# ---------------------------------------------------------------------------------------------------- the tables


def validation_blocks(run: Run) -> Iterator[Block]:
    """Of each protocol the DSC by structure at the first, best and last validation; then start and now."""
    steps = sorted(run.validation["step"].unique())
    if steps:
        yield Note("Mean DSC of whole cases of the val split by modality and structure.")
        names = {"first": steps[0], "best": run.best_step, "last": steps[-1]} if len(steps) > 1 else {"last": steps[-1]}
        for protocol, rows in run.validation.groupby("protocol", sort=False):
            yield validation_table(protocol, rows, {name: step for name, step in names.items() if step in steps})
    compared: list[tuple[Cell, ...]] = []
    for key, name in COMPARED_WITH_START.items():
        values, begin = run.series(key), run.start.get(key + START)
        if len(values) and begin is not None:
            compared.append((name, begin, values.iloc[-1], signed(values.iloc[-1] - begin)))
    if compared:
        yield Table(
            "The starting model and this one", (*words(""), *numbers("start", "now", "change")), tuple(compared)
        )


def validation_table(title: str, rows: pd.DataFrame, steps: Mapping[str, int]) -> Table:
    """One row per structure. rows: of validation.csv. steps: of the columns, by their names."""
    groups = rows.groupby(["data", "modality", "structure"], sort=False)
    lines: list[tuple[Cell, ...]] = []
    for (data, modality, structure), group in groups:
        scores = group.groupby("step")["dsc"].last().reindex(list(steps.values())).tolist()
        name = structure + (" (general)" if data != "own" else "")
        change = [signed(scores[-1] - scores[0])] if len(steps) > 1 else []
        lines.append((modality, name, int(group["cases"].iloc[-1]), int(group["objects"].iloc[-1]), *scores, *change))
    columns = (*words("modality", "structure"), *numbers("cases", "objects"))
    columns += numbers(*(f"{name}\nstep {step}" for name, step in steps.items()))
    columns += numbers("change since\nthe first") if len(steps) > 1 else ()
    return Table(title, columns, tuple(lines))


def signed(change: float) -> str:
    """`+0.012`; never `-0.000`; a dash where a score is not known."""
    return MISSING if math.isnan(change) else f"{round(change, 3) + 0.0:+.3f}"


def event_table(events: Sequence[Event]) -> Table:
    rows = tuple((f"{event.time:%Y-%m-%d %H:%M:%S} UTC", event.kind, event.text) for event in events)
    return Table("", words("time", "event", "what"), rows)


def picture_blocks(run: Run) -> Iterator[Block]:
    """The pictures of each clip in the order of the steps."""
    if len(run.pictures):
        yield Note("Always the same clips and prompts. In a corner: the DSC of that frame; below: that of the clip.")
    for (modality, structure, case, _), rows in run.pictures.groupby(CLIP, sort=False):
        frames = rows["frames"].iloc[0]
        yield Heading(f"{modality} {structure}, case {case[:8]}, {'still' if frames == 1 else f'{frames} frames'}")
        for row in rows.itertuples():
            path = run.folder / PICTURES / row.file
            if path.is_file():
                best = ", best" if row.step == run.best_step else ""
                yield Picture(path.read_bytes(), f"step {row.step}{best}: DSC {row.dsc:.3f}", colours=OUTLINES)
