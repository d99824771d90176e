"""`evaluate.py`: every case, every checkpoint, every protocol and corruption; then tables, files, pictures, the page.

settings ──> cases, checkpoints ──> parts/ (`running`: each rank finishes its share of the cases)
         ──> rows ──> summary ──> cases.*, summary.*, failures.csv, overlays/, worst/, report.html (`results`)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track

from medsam2.errors import UserError
from medsam2.evaluation.report.report import Report
from medsam2.evaluation.report.results import write_results
from medsam2.evaluation.run.cases import Run, run_cases
from medsam2.evaluation.run.checkpoints import CheckpointNote, load_contestants
from medsam2.evaluation.run.ranks import ALONE, Rank, meeting_point
from medsam2.evaluation.run.resume import PARTS, PartsFolder, refuse_existing
from medsam2.evaluation.run.sources import find_source
from medsam2.evaluation.settings import EvaluateSettings, SourceSettings

if TYPE_CHECKING:
    from medsam2.cases.settings import SettingsBook

FIELDS_OF_ROWS = {"metrics", "corruption", "memory", "precision", "overlays", "worst"}
"""Settings that the finished cases depend on as they stand."""

__all__ = ["Report", "evaluate", "evaluate_share"]


def evaluate(settings: EvaluateSettings, rank: Rank = ALONE) -> Report:
    """Score `settings.checkpoint` on `settings.data.source`, print the tables and write the output folder.

    Args:
        rank: rank 0 of the ranks that share the cases; the others call `evaluate_share`.

    Raises:
        UserError: a path, split, structure or device that does not exist, an output folder that does, too many cases
            that failed (all files are written then), or ranks that never finished.
    """
    run, notes = evaluate_share(settings, rank)
    run.parts.load()
    missing = sum(run.parts.find(name.key, name.state) is None for name in run.names)
    if missing:
        raise UserError(
            f"output={settings.output}: {missing} of {run.cases.count} cases are in no {PARTS}/rank-N.jsonl; give "
            "every rank the same command and one output folder that all of them see, and resume=true."
        )
    return write_results(run, notes)


def evaluate_share(settings: EvaluateSettings, rank: Rank) -> tuple[Run, list[CheckpointNote]]:
    """Finish this rank's share of the cases, and return when all ranks have finished theirs.

    Raises:
        UserError: as `evaluate`.
    """
    with meeting_point(rank) as meet:
        if rank.leads:
            refuse_existing(Path(settings.output), settings.resume or rank.restarted)
        data, book = settings.data, _book(settings.data)
        raw = (data.layout, data.modality, book)
        cases = find_source(data.source, settings.split, settings.limit, settings.structures, *raw)
        contestants = load_contestants(settings, rank)
        notes = [contestant.note for contestant in contestants]
        run = Run(settings, cases, cases.names(), PartsFolder(Path(settings.output), _content(settings, notes, book)))
        if rank.leads:
            run.parts.begin()
        meet()
        numbers = run.unfinished()
        meet()  # nobody adds a case before all have seen which are missing
        share = numbers[rank.index :: rank.count]
        print(f"rank {rank.index}: {len(share)} of {run.cases.count} cases to evaluate", file=sys.stderr)
        bar = track(share, "evaluating", console=Console(stderr=True), transient=True, disable=not rank.leads)
        run_cases(run, contestants, bar, rank.index)
        meet()
    return run, notes


def _book(data: SourceSettings) -> SettingsBook | None:
    """The settings of the data sets in the file `data.config`.

    Raises:
        UserError: no such file, or a wrong key or value.
    """
    if data.config is None:
        return None
    from medsam2.cases.settings import read_settings

    return read_settings(Path(data.config), flag="data.config=")


def _content(settings: EvaluateSettings, notes: list[CheckpointNote], book: SettingsBook | None) -> dict[str, Any]:
    """The settings that the rows depend on. There are no paths in it, so that a folder may be moved."""
    from medsam2 import __version__

    return {
        "version": __version__,
        "checkpoint": [[note.label, note.weights, note.image_size] for note in notes],
        "protocols": [protocol.model_dump(mode="json", exclude={"citation"}) for protocol in settings.all_protocols],
        "data": [settings.data.layout, settings.data.modality, book and book.model_dump(mode="json")],
        "seed": settings.seed if settings.corruption.names else None,
        "compile": sorted(settings.compile),
        "structures": sorted(settings.structures),
        **settings.model_dump(mode="json", include=FIELDS_OF_ROWS),
    }
