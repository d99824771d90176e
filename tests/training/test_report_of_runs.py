"""The run's page: it says what the run's files say, stands alone, and is written however the run ends."""

from __future__ import annotations

import base64
import csv
import re
import shutil
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException
from ranks import SMALLEST

from medsam2.config import compose, validate
from medsam2.errors import UserError
from medsam2.reporting.curves import Line, draw_diagrams, to_svg
from medsam2.reporting.tables import Table
from medsam2.training.fit import fit
from medsam2.training.report import (
    Run,
    diagrams,
    duration,
    rates,
    read_run,
    state,
    validation_blocks,
    warnings,
    write_report,
)
from medsam2.training.run_folder.events import BEGIN, END, NOTE, WARNING, Event, Events, note, read_events, run_seconds
from medsam2.training.settings import TrainSettings

START = datetime(2026, 1, 1, tzinfo=UTC)


class Page(HTMLParser):
    """Text, headings and what the page loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a run folder, to be changed."""
    return shutil.copytree(tiny_run, tmp_path / "whole", ignore=shutil.ignore_patterns("checkpoints"))


def test_a_run_ends_with_a_page_that_loads_nothing(tiny_run: Path) -> None:
    page = Page(tiny_run / "report.html")
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert "script" not in page.tags and page.tags.count("img") == 1 + 2 * 6
    assert str(tiny_run.parent) not in (tiny_run / "report.html").read_text().split("config.yaml")[0]
    for word in ("Curves", "Validation", "Pictures", "Events", "Configuration", "finished", "6 of 6", "hiera_nano"):
        assert word in page.text, word


def test_the_page_has_the_figures_of_the_files(tiny_run: Path) -> None:
    text = Page(tiny_run / "report.html").text
    with open(tiny_run / "validation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 10
    for row in rows:
        assert row["structure"] in text and f"{float(row['dsc']):.3f}" in text
    with open(tiny_run / "metrics.csv", newline="") as file:
        scores = [float(row["val/dsc"]) for row in csv.DictReader(file) if row["val/dsc"]]
    assert f"{max(scores):.3f}" in text and f"{scores[-1]:.3f}" in text
    assert f"best DSC, step {3 if scores[0] >= scores[1] else 6}" in text
    assert yaml.safe_dump(yaml.safe_load((tiny_run / "config.yaml").read_text()), sort_keys=False).strip() in text


def test_the_curves_are_an_svg_with_every_panel(tiny_run: Path) -> None:
    source = next(s for s in Page(tiny_run / "report.html").sources if s.startswith("data:image/svg"))
    drawn = base64.b64decode(source.split(",")[1]).decode()
    titles = ("Loss", "Loss by part, unweighted", "Loss by kind of prompt", "Validation DSC", "Learning rate",
              "Gradient norm before clipping", "Clips per second of each rank", "waiting for data")  # fmt: skip
    assert all(f"{title}" in drawn for title in titles)
    again = draw_diagrams(diagrams(read_run(tiny_run)))
    assert drawn.encode() == to_svg(again), "the same figures, the same bytes"


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.yaml"):
        write_report(tmp_path)


def test_names_from_data_are_words_and_not_html(run: Path) -> None:
    path = run / "validation.csv"
    path.write_text(path.read_text().replace("kidney", "<script>alert(1)</script>"))
    page = Page(write_report(run))
    assert "script" not in page.tags and "<script>alert(1)</script>" in page.text


def test_structures_with_numbers_for_names_and_unknown_scores_have_rows(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "validation.csv").write_text(
        "step,protocol,data,modality,structure,cases,objects,dsc\n5,box,own,CT,1,3,4,0.25\n9,box,own,CT,1,3,4,nan\n"
    )
    _, table = validation_blocks(read_run(tmp_path))
    assert isinstance(table, Table) and table.lines == [["CT", "1", "3", "4", "0.250", "-", "-"]]


def test_start_and_now_stand_side_by_side(run: Path) -> None:
    (run / "start_scores.json").write_text('{"val/obedience_start": 0.25}')
    value = read_run(run).series("val/obedience").iloc[-1]
    text = " ".join(Page(write_report(run)).text.split())
    assert f"boxes that are obeyed 0.250 {value:.3f} {round(value - 0.25, 3) + 0.0:+.3f}" in text


def test_what_went_wrong_is_said_first(run: Path) -> None:
    lines = (run / "metrics.csv").read_text().splitlines()
    last = len(lines) - 1
    changed = [
        line + tail for line, tail in zip(lines, [",train/skipped,data/lost", *[",2.0,7.0"] * last], strict=True)
    ]
    (run / "metrics.csv").write_text("\n".join(changed) + "\n")
    note(run, WARNING, "last.ckpt was damaged or missing; the run went on from previous.ckpt")
    found = " ".join(warnings(read_run(run)))
    assert "2 steps were skipped" in found
    assert "7 damaged or missing segments" in found and "previous.ckpt" in found
    html = write_report(run).read_text()
    assert html.index("2 steps were skipped") < html.index("Validation</h2>")


def test_an_undisturbed_run_has_no_warnings(tiny_run: Path) -> None:
    found = [line for line in warnings(read_run(tiny_run)) if "waiting for data" not in line]  # a slow machine may
    assert found == []


# ------------------------------------------------------------------------------------------------- other ends


def short(shards: Path, folder: Path, *more: str) -> list[str]:
    own = (f"data.shards={shards}", f"output={folder}", "trainer.progress=none", "trainer.max_steps=3")
    return [*SMALLEST, *own, *more]


def test_a_run_that_fails_leaves_a_page_that_says_why(phantom_shards: Path, tmp_path: Path) -> None:
    config = compose("train", short(phantom_shards, tmp_path / "run", "module=faulty.NanLoss",
                                    "trainer.max_bad_steps=1"))  # fmt: skip
    with pytest.raises(UserError, match="max_bad_steps"):
        fit(config)
    text = Page(tmp_path / "run" / "report.html").text
    assert "failed" in text and "1 steps in a row" in text and "2 of 3" in text
    assert read_events(tmp_path / "run")[-1].kind == END


def trainer_at(step: int) -> Any:
    return SimpleNamespace(global_step=step, max_steps=9, training=True)


def settings_of(run: Path, **more: Any) -> TrainSettings:
    config = yaml.safe_load((run / "config.yaml").read_text())
    return validate(TrainSettings, {**config, **more}, "the configuration")


def test_a_killed_run_ends_in_its_events_when_it_goes_on(tiny_run: Path, run: Path) -> None:
    (run / "events.csv").unlink()
    note(run, BEGIN, "a new run from nano", START)
    assert state(read_run(run)) == "running"
    changed = settings_of(run, resume="auto", loss={"focal": 7.0})
    events = Events(changed, run, run / "checkpoints" / "previous.ckpt")
    saved = torch.load(tiny_run / "checkpoints" / "previous.ckpt", weights_only=True)
    events.on_load_checkpoint(trainer_at(3), None, saved)  # type: ignore[arg-type]
    events.on_train_start(trainer_at(3), None)  # type: ignore[arg-type]
    found = read_events(run)
    assert [event.kind for event in found] == [BEGIN, END, BEGIN, WARNING, *[WARNING] * (len(found) - 4)]
    written = (run / "metrics.csv").stat().st_mtime
    assert found[1].text == "killed" and abs(found[1].time.timestamp() - written) < 2
    said = " ".join(event.text for event in found[2:])
    assert (
        "from step 3" in said
        and "damaged or missing" in said
        and re.search(r"loss.focal was \S+ and is 7.0 from step 3 on", said)
    )


def test_the_time_of_a_run_leaves_interruptions_out() -> None:
    events = [
        Event(START, BEGIN, ""),
        Event(START + timedelta(seconds=5), WARNING, ""),
        Event(START + timedelta(seconds=10), END, "stopped at step 5 of 9"),
        Event(START + timedelta(hours=9), BEGIN, ""),
        Event(START + timedelta(hours=9, seconds=1), NOTE, ""),
    ]
    assert run_seconds(events, START + timedelta(hours=9, seconds=30)) == 40
    assert [duration(s) for s in (12.4, 200, 7500)] == ["12 s", "3 min 20 s", "2 h 5 min"]


def test_a_run_that_stopped_early_says_at_which_step(run: Path) -> None:
    Events(settings_of(run), run, None).on_train_end(trainer_at(4), None)  # type: ignore[arg-type]
    assert state(read_run(run)) == "stopped" and "stopped at step 4 of 9" in " ".join(warnings(read_run(run)))


@pytest.mark.parametrize("error", [SIGTERMException("SIGTERM; resume=auto goes on"), KeyboardInterrupt()])
def test_a_signal_stops_a_run_and_does_not_fail_it(run: Path, error: BaseException) -> None:
    note(run, BEGIN, "goes on from step 2")
    Events(settings_of(run), run, None).on_exception(trainer_at(4), None, error)  # type: ignore[arg-type]
    assert state(read_run(run)) == "stopped" and read_events(run)[-1].text.startswith("stopped at step 4 of 9: ")


def test_what_fails_before_training_is_no_event(run: Path) -> None:
    before = (run / "events.csv").read_bytes()
    Events(settings_of(run), run, None).on_exception(trainer_at(0), None, ValueError("x"))  # type: ignore[arg-type]
    assert (run / "events.csv").read_bytes() == before


def test_a_line_of_events_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    note(tmp_path, BEGIN, "one\nline, with commas", START)
    with open(tmp_path / "events.csv", "a") as file:
        file.write("2026-01-01T00")
    assert read_events(tmp_path) == [Event(START, BEGIN, "one line, with commas")]


# ----------------------------------------------------------------------------------------------------- curves


def run_of(metrics: dict[int, dict[str, float]], start: dict[str, float] | None = None) -> Run:
    table = pd.DataFrame.from_dict(metrics, orient="index")
    return Run(Path("run"), {}, {}, table, pd.DataFrame(), pd.DataFrame(), start or {}, ())


def test_what_was_not_logged_has_no_diagram_and_nan_no_point() -> None:
    metrics = {0: {"train/loss": 2.0}, 1: {"train/loss": float("nan")}, 2: {"train/loss": 1.0}}
    (loss,) = diagrams(run_of(metrics))
    assert loss.title == "Loss" and loss.lines == (Line("training", [0, 2], [2.0, 1.0]),)
    assert diagrams(run_of({})) == [] == diagrams(run_of({0: {"train/loss": float("nan")}}))


def test_a_curve_begins_with_the_score_of_the_starting_model() -> None:
    (scores,) = diagrams(run_of({9: {"val/retention": 0.5}}, {"val/retention_start": 0.7}))
    assert scores.lines == (Line("retention", [0, 9], [0.7, 0.5]),)


def test_groups_of_one_rate_are_one_line() -> None:
    names = [f"lr-AdamW/{part}" for part in "abcd"]
    metrics = {step: dict(zip(names, (1.0, 1.0, 3.0, 1.0), strict=True)) for step in (0, 1)}
    assert rates(run_of(metrics)) == {"a, b, d": names[0], "c": names[2]}


def test_modalities_are_curves_of_their_own(tiny_run: Path) -> None:
    shown = {found.title: [line.label for line in found.lines] for found in diagrams(read_run(tiny_run))}
    assert {"mean", "CT", "ENDOSCOPY"} <= set(shown["Validation DSC"])
    assert re.search("box|click|mask|dense", " ".join(shown["Loss by kind of prompt"]))
