"""From finished parts to what the output folder holds: rows, summary, tables, pictures, the page.

    cases.parquet, cases.csv   one row a checkpoint, protocol, corruption and object (`quick.Row`)
    summary.json               what `summary` and `comparison` say of them, by protocol (SUMMARY below)
    summary.md, summary.tex    the tables, to read and to print
    failures.csv               cases without rows, and why; no such file without failures
    overlays/, worst/          pictures: the first of each group, and the lowest scores, in a folder a protocol
    robustness/                curves, one picture a protocol, where there are corruptions
    report.html                all of it on one page
    settings.json              the settings

SUMMARY: {"version", "source": PATH, "grid": "stored" | "native", "split": NAME, "cases": int, "failed": int,
"limit": int, "available": int (cases before the limit),
"checkpoints": [LABEL, ...] (the first is the baseline), "models": [contestants.CheckpointNote, ...],
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
from medsam2.evaluation.report import report
from medsam2.evaluation.report.overlays import Drawn, PictureChoice
from medsam2.evaluation.run.cases import Run
from medsam2.evaluation.run.checkpoints import CheckpointNote
from medsam2.evaluation.run.resume import Part
from medsam2.evaluation.run.score_case import Row
from medsam2.evaluation.statistics import robustness
from medsam2.evaluation.statistics.comparison import compare
from medsam2.evaluation.statistics.intervals import LEVEL
from medsam2.evaluation.statistics.summary import summarise
from medsam2.files import atomic_write, write_text

if TYPE_CHECKING:
    import pandas as pd

KEY = "part"  # in memory only: tells the segments of one case apart


def write_results(run: Run, notes: Sequence[CheckpointNote]) -> report.Report:
    """Read all parts, write the output folder and print the tables.

    Raises:
        UserError: no case has rows, or more than `max_failed` failed; the files are written first.
    """
    import pandas as pd

    settings, output = run.settings, Path(run.settings.output)
    parts = [part for name in run.names if (part := run.parts.find(name.key, name.state)) is not None]
    failures = [{"dataset": p.dataset, "case": p.case, **asdict(p.failure)} for p in parts if p.failure is not None]
    (output / "failures.csv").unlink(missing_ok=True)
    if failures:
        with atomic_write(output / "failures.csv", "w") as file:
            pd.DataFrame(failures).to_csv(file, index=False)
    frame = _table(parts, [note.label for note in notes])
    if frame is None:
        first = f" The first: {failures[0]['reason']}" if failures else ""
        raise UserError(
            f"{run.cases.source}: nothing to score; all {len(failures)} cases failed, see {output}/failures.csv.{first}"
        )
    found = _report(run, notes, frame, parts, failures)
    _write(output, found)
    report.print_tables(found)
    share = len(failures) / len(parts)
    if share > settings.max_failed:
        raise UserError(
            f"{len(failures)} of {len(parts)} cases failed, more than max_failed={settings.max_failed:g} allows; "
            f"{output}/failures.csv says why, all other results are written. Mend them and give resume=true, or raise "
            "max_failed."
        )
    return found


def _table(parts: Sequence[Part], labels: Sequence[str]) -> pd.DataFrame | None:
    import pandas as pd

    rows = [{**row, KEY: part.key} for part in parts for row in part.rows]
    if not rows:
        return None
    frame = pd.DataFrame(rows).astype({"absent_all_empty": "boolean"})
    frame = frame.sort_values("checkpoint", key=lambda column: column.map(list(labels).index), kind="stable")
    what = list(Row.__annotations__)  # what a row is of stands before its scores
    return frame[[*what, *frame.columns.difference(what, sort=False)]].reset_index(drop=True)


def _report(
    run: Run, notes: Sequence[CheckpointNote], frame: pd.DataFrame, parts: Sequence[Part], failures: list[Any]
) -> report.Report:
    settings, labels = run.settings, [note.label for note in notes]
    leaking = frame[frame["leak"] & (frame["corruption"] == "")]
    leaks = leaking[["checkpoint", "dataset", "case"]].drop_duplicates()["checkpoint"].tolist()
    protocols = []
    for protocol in settings.all_protocols:
        rows = frame[frame["protocol"] == protocol.name]
        # segments of one case are pairs of their own
        pairs = rows.assign(case=rows[KEY])
        undamaged = rows["corruption"] == ""
        protocols.append(
            {
                "protocol": protocol.model_dump(mode="json"),
                "outside": {note.label: note.outside[protocol.name] for note in notes if protocol.name in note.outside},
                "groups": summarise(rows[undamaged], labels, settings.seed, settings.resamples),
                "comparisons": compare(pairs[undamaged], labels, settings.seed),
                "robustness": robustness.summarise(pairs, labels),
            }
        )
    summary = {
        "version": run.parts.content["version"],
        "source": run.cases.source,
        "grid": run.cases.grid,
        "split": settings.split if run.cases.grid == "stored" else None,
        "cases": len(parts),
        "failed": len(failures),
        "limit": settings.limit,
        "available": run.cases.available,
        "checkpoints": labels,
        "models": [asdict(note) for note in notes],
        "memory": settings.memory.model_dump(mode="json"),
        "bootstrap": {"seed": settings.seed, "resamples": settings.resamples, "level": LEVEL},
        "metrics": settings.metrics.model_dump(mode="json"),
        "leaks": {label: leaks.count(label) for label in labels},
        "protocols": protocols,
        "failures": failures,
        "protocol": protocols[0]["protocol"],
        "groups": protocols[0]["groups"],
    }
    first, worst = _pictures(run, parts)
    return report.Report(summary, frame.drop(columns=KEY), settings, first, worst)


# ------------------------------------------------------------------------------------------------------- writing


def _pictures(run: Run, parts: Sequence[Part]) -> tuple[list[Drawn], list[Drawn]]:
    """The pictures that were chosen, copied out of the parts."""
    settings, output = run.settings, Path(run.settings.output)
    drawn = [replace(one, file=run.parts.folder / one.file) for part in parts for one in part.pictures]
    first, worst = PictureChoice(settings.overlays, settings.worst).chosen([one for one in drawn if one.file.is_file()])
    return _copied(first, output / "overlays", False), _copied(worst, output / "worst", True)


def _copied(pictures: Sequence[Drawn], folder: Path, ranked: bool) -> list[Drawn]:
    """Copies in a folder a protocol, named by what they show; with `ranked`, by their place as well."""
    shutil.rmtree(folder, ignore_errors=True)
    copies, places = [], Counter[str]()
    for one in pictures:
        protocol = one.row["protocol"]
        places[protocol] += 1
        target = folder / _file_name(protocol) / (f"{places[protocol]:02d}_{one.name}" if ranked else one.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(one.file, target)
        copies.append(replace(one, file=target))
    return copies


def _file_name(text: str) -> str:
    """A protocol may be called anything."""
    return re.sub(r"[^\w.-]", "-", text)


def _write(output: Path, found: report.Report) -> None:
    with atomic_write(output / "cases.parquet") as file:
        found.rows.to_parquet(file, index=False)
    with atomic_write(output / "cases.csv", "w") as file:
        found.rows.to_csv(file, index=False)
    write_text(output / "summary.json", json.dumps(found.summary, indent=1, allow_nan=False) + "\n")
    write_text(output / "settings.json", found.settings.model_dump_json(indent=1) + "\n")
    for entry in found.summary["protocols"]:
        if entry["robustness"]:
            (output / "robustness").mkdir(exist_ok=True)
            with atomic_write(output / "robustness" / f"{_file_name(entry['protocol']['name'])}.png") as file:
                file.write(report.draw_robustness(entry["robustness"]))
    report.write_markdown(output / "summary.md", found)
    report.write_latex(output / "summary.tex", found)
    report.write_report_page(output / "report.html", found)
