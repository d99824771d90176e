"""Writes the output folder from the results of the cases: rows, summary, tables, pictures, the page.

    cases.parquet, cases.csv   one row per checkpoint, protocol, corruption and object (`score_case.Row`)
    summary.json               groups, comparisons and robustness of each protocol (SUMMARY below)
    summary.md, summary.tex    the tables as Markdown and LaTeX
    failures.csv               cases without rows, and why; only if a case failed
    overlays/, worst/          pictures: the first of each group, and the lowest scores; one folder per protocol
    robustness/                curves, one picture per protocol; only if there are corruptions
    report.html                everything on one page
    settings.json              the settings

SUMMARY: {"version", "source": PATH, "grid": "stored" | "native", "split": NAME, "cases": int, "failed": int,
"limit": int, "available": int (cases before the limit),
"checkpoints": [LABEL, ...] (the first is the baseline), "models": [checkpoints.CheckpointInfo, ...],
"bootstrap": {"seed", "resamples", "level"}, "metrics": MetricSettings, "memory": MemorySettings, "leaks": {LABEL:
number of cases that the checkpoint was trained on}, "protocols": [{"protocol": ProtocolSettings, "outside": {LABEL:
why}, "groups": [GROUP, ...], "comparisons": [TEST, ...], "robustness": [...]}, ...], "failures": [{"dataset", "case",
"stage", "reason", "remedy"}, ...], "protocol" and "groups": those of the first protocol}.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsam2.errors import UserError
from medsam2.evaluation.report.overlays import DrawnPicture, PictureSelection
from medsam2.evaluation.report.report import Report, draw_robustness, print_tables, write_pages
from medsam2.evaluation.run.cases import Run
from medsam2.evaluation.run.resume import CaseResult
from medsam2.evaluation.run.score_case import Row
from medsam2.evaluation.statistics import robustness
from medsam2.evaluation.statistics.comparison import compare
from medsam2.evaluation.statistics.intervals import LEVEL
from medsam2.evaluation.statistics.summary import summarise
from medsam2.files import atomic_write, write_text

if TYPE_CHECKING:
    import pandas as pd

KEY = "part"  # a column in memory that distinguishes the segments of one case


def write_results(run: Run) -> Report:
    """Write the output folder from the results of all cases, and print the tables.

    Raises:
        UserError: no case has rows, or more than `max_failed` failed; the files are written first.
    """
    import pandas as pd

    settings, output = run.settings, Path(run.settings.output)
    results = [result for name in run.names if (result := run.results.find(name.key, name.state)) is not None]
    failures = [{"dataset": r.dataset, "case": r.case, **asdict(r.failure)} for r in results if r.failure is not None]
    (output / "failures.csv").unlink(missing_ok=True)
    if failures:
        with atomic_write(output / "failures.csv", "w") as file:
            pd.DataFrame(failures).to_csv(file, index=False)
    frame = _table(results, [checkpoint.info.label for checkpoint in run.checkpoints])
    if frame is None:
        first = f" The first: {failures[0]['reason']}" if failures else ""
        raise UserError(
            f"{run.cases.source}: nothing to score; all {len(failures)} cases failed, see {output}/failures.csv.{first}"
        )
    report = _make_report(run, frame, results, failures)
    _write(output, report)
    print_tables(report)
    share = len(failures) / len(results)
    if share > settings.max_failed:
        raise UserError(
            f"{len(failures)} of {len(results)} cases failed, more than max_failed={settings.max_failed:g} allows; "
            f"{output}/failures.csv says why, all other results are written. Fix these cases and run again with "
            "resume=true, or raise max_failed."
        )
    return report


def _table(results: Sequence[CaseResult], labels: Sequence[str]) -> pd.DataFrame | None:
    import pandas as pd

    rows = [{**row, KEY: result.key} for result in results for row in result.rows]
    if not rows:
        return None
    frame = pd.DataFrame(rows).astype({"absent_all_empty": "boolean"})
    frame = frame.sort_values("checkpoint", key=lambda column: column.map(list(labels).index), kind="stable")
    identity = list(Row.__annotations__)  # without the inherited scores, which follow
    return frame[[*identity, *frame.columns.difference(identity, sort=False)]].reset_index(drop=True)


def _make_report(run: Run, frame: pd.DataFrame, results: Sequence[CaseResult], failures: list[Any]) -> Report:
    settings, infos = run.settings, [checkpoint.info for checkpoint in run.checkpoints]
    labels = [info.label for info in infos]
    leaking = frame[frame["leak"] & (frame["corruption"] == "")]
    leaks = leaking[["checkpoint", "dataset", "case"]].drop_duplicates()["checkpoint"].tolist()
    protocols = []
    for protocol in settings.all_protocols:
        rows = frame[frame["protocol"] == protocol.name]
        segments = rows.assign(case=rows[KEY])  # paired by segment, not by case
        clean = rows["corruption"] == ""
        protocols.append(
            {
                "protocol": protocol.model_dump(mode="json"),
                "outside": {info.label: info.outside[protocol.name] for info in infos if protocol.name in info.outside},
                "groups": summarise(rows[clean], labels, settings.seed, settings.resamples),
                "comparisons": compare(segments[clean], labels, settings.seed),
                "robustness": robustness.summarise(segments, labels),
            }
        )
    summary = {
        "version": run.results.settings["version"],
        "source": run.cases.source,
        "grid": run.cases.grid,
        "split": settings.split if run.cases.grid == "stored" else None,
        "cases": len(results),
        "failed": len(failures),
        "limit": settings.limit,
        "available": run.cases.available,
        "checkpoints": labels,
        "models": [asdict(info) for info in infos],
        "memory": settings.memory.model_dump(mode="json"),
        "bootstrap": {"seed": settings.seed, "resamples": settings.resamples, "level": LEVEL},
        "metrics": settings.metrics.model_dump(mode="json"),
        "leaks": {label: leaks.count(label) for label in labels},
        "protocols": protocols,
        "failures": failures,
        "protocol": protocols[0]["protocol"],
        "groups": protocols[0]["groups"],
    }
    first, worst = _copy_selected(run, results)
    return Report(summary, frame.drop(columns=KEY), settings, first, worst)


# ------------------------------------------------------------------------------------------------------- writing


def _copy_selected(run: Run, results: Sequence[CaseResult]) -> tuple[list[DrawnPicture], list[DrawnPicture]]:
    """Copy the selected pictures from `parts/` to `overlays/` (first of each group) and `worst/`."""
    settings, output = run.settings, Path(run.settings.output)
    drawn = [replace(one, file=run.results.folder / one.file) for result in results for one in result.pictures]
    selection = PictureSelection(settings.overlays, settings.worst)
    first, worst = selection.select([picture for picture in drawn if picture.file.is_file()])
    return _copy_pictures(first, output / "overlays", False), _copy_pictures(worst, output / "worst", True)


def _copy_pictures(pictures: Sequence[DrawnPicture], folder: Path, ranked: bool) -> list[DrawnPicture]:
    """Copy pictures into one folder per protocol; with `ranked`, file names begin with the rank."""
    shutil.rmtree(folder, ignore_errors=True)
    copies, ranks = [], Counter[str]()
    for picture in pictures:
        protocol = picture.row["protocol"]
        ranks[protocol] += 1
        name = f"{ranks[protocol]:02d}_{picture.file_name}" if ranked else picture.file_name
        target = folder / _to_file_name(protocol) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture.file, target)
        copies.append(replace(picture, file=target))
    return copies


def _to_file_name(text: str) -> str:
    """Replace characters that file names may not contain; users choose the names of protocols freely."""
    return re.sub(r"[^\w.-]", "-", text)


def _write(output: Path, report: Report) -> None:
    with atomic_write(output / "cases.parquet") as file:
        report.rows.to_parquet(file, index=False)
    with atomic_write(output / "cases.csv", "w") as file:
        report.rows.to_csv(file, index=False)
    write_text(output / "summary.json", json.dumps(report.summary, indent=1, allow_nan=False) + "\n")
    write_text(output / "settings.json", report.settings.model_dump_json(indent=1) + "\n")
    for entry in report.summary["protocols"]:
        if entry["robustness"]:
            (output / "robustness").mkdir(exist_ok=True)
            with atomic_write(output / "robustness" / f"{_to_file_name(entry['protocol']['name'])}.png") as file:
                file.write(draw_robustness(entry["robustness"]))
    write_pages(output, report)
