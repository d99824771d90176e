"""`evaluate.py`: every case, every checkpoint, every protocol and corruption; then tables, files, pictures, the page.

settings ──> cases, checkpoints ──> parts/ (one file a case: `running`, by one process, workers or ranks)
         ──> rows ──> summary ──> cases.*, summary.*, failures.csv, overlays/, worst/, report.html (`results`)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsam2.errors import UserError
from medsam2.evaluation.contestants import CheckpointNote, Contestant, describe_checkpoints, load_contestants
from medsam2.evaluation.parts import Part, PartsFolder, refuse_existing
from medsam2.evaluation.ranks import ALONE, Rank
from medsam2.evaluation.results import EvaluationResult, write_results
from medsam2.evaluation.running import Run, Watch, run_share
from medsam2.evaluation.settings import EvaluateSettings, SourceSettings
from medsam2.evaluation.sources import find_source
from medsam2.evaluation.workers import new_launch, others, run_workers, shares, wait_for_ranks

if TYPE_CHECKING:
    from rich.progress import Progress

    from medsam2.cases.settings import SettingsBook

__all__ = ["EvaluationResult", "evaluate", "evaluate_share"]


def evaluate(settings: EvaluateSettings, rank: Rank = ALONE) -> EvaluationResult:
    """Score `settings.checkpoint` on `settings.data.source`, print the tables and write the output folder.

    Args:
        rank: rank 0 of the ranks that share the cases; the others call `evaluate_share`.

    Raises:
        UserError: a path, split, structure or device that does not exist, an output folder that does, too many cases
            that failed (all files are written then), or ranks that never finished.
    """
    if settings.workers > 1 and rank.count > 1:
        raise UserError(f"workers={settings.workers} under {rank.count} ranks: give workers=1; ranks share the cases.")
    resume = settings.resume or rank.again
    refuse_existing(Path(settings.output), resume)
    launch = rank.launch if rank.count > 1 else new_launch()
    run, notes, contestants = _open(settings, rank, launch, predicts=settings.workers == 1)
    run.parts.begin(resume)
    with _progress(run.cases.count) as watch:
        if settings.workers > 1:
            run_workers(run, work, launch, watch)
        else:
            dealt = shares(run, rank.count)
            run_share(run, contestants, dealt[rank.index], rank.index, watch)
            wait_for_ranks(run, others(dealt, rank.index), watch)
    return write_results(run, notes)


def evaluate_share(settings: EvaluateSettings, rank: Rank, watch: Watch = lambda part: None) -> None:
    """What ranks other than 0, and worker processes, do: their share of the cases, as parts in the output folder.

    Raises:
        UserError: as `evaluate`, or rank 0 does not start or has other settings.
    """
    run, _, contestants = _open(settings, rank, rank.launch, predicts=True)
    run.parts.join(settings.wait_minutes)
    run_share(run, contestants, shares(run, rank.count)[rank.index], rank.index, watch)


def work(settings: EvaluateSettings, rank: Rank, threads: int) -> None:
    """A worker process: its share, and no longer than its parent lives."""
    import torch

    torch.set_num_threads(threads)
    parent = os.getppid()

    def stop_if_orphaned(part: Part) -> None:
        if os.getppid() != parent:
            raise SystemExit(0)

    try:
        evaluate_share(settings, rank, stop_if_orphaned)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _open(
    settings: EvaluateSettings, rank: Rank, launch: str, predicts: bool
) -> tuple[Run, list[CheckpointNote], list[Contestant]]:
    """The cases and the folder of their parts, what stands of each checkpoint, and these if this process predicts."""
    data, book = settings.data, _book(settings.data)
    cases = find_source(
        data.source, settings.split, settings.limit, settings.structures, data.layout, data.modality, book
    )
    contestants = load_contestants(settings, rank) if predicts else []
    notes = [contestant.note for contestant in contestants] or describe_checkpoints(settings)
    parts = PartsFolder(Path(settings.output), _content(settings, notes, book), launch)
    return Run(settings, cases, cases.names(), parts), notes, contestants


def _book(data: SourceSettings) -> SettingsBook | None:
    """What `data.config` says of the data sets.

    Raises:
        UserError: no such file, or a wrong key or value.
    """
    if data.config is None:
        return None
    from medsam2.cases.settings import read_settings

    return read_settings(Path(data.config), flag="data.config=")


def _content(settings: EvaluateSettings, notes: list[CheckpointNote], book: SettingsBook | None) -> dict[str, Any]:
    """What the rows depend on, beside the cases themselves: no paths, so that a folder may be moved."""
    from medsam2 import __version__

    return {
        "version": __version__,
        "checkpoint": [[note.label, note.weights, note.image_size] for note in notes],
        "protocols": [protocol.model_dump(mode="json", exclude={"citation"}) for protocol in settings.all_protocols],
        "metrics": settings.metrics.model_dump(mode="json"),
        "corruption": settings.corruption.model_dump(mode="json") if settings.corruption.names else None,
        "seed": settings.seed if settings.corruption.names else None,
        "memory": settings.memory.model_dump(mode="json"),
        "precision": settings.precision,
        "compile": sorted(settings.compile),
        "structures": sorted(settings.structures),
        "data": [settings.data.layout, settings.data.modality, book and book.model_dump(mode="json")],
        "pictures": [settings.overlays, settings.worst],
    }


@contextmanager
def _progress(count: int) -> Iterator[Watch]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar: Progress = Bar(*columns, console=console, disable=not console.is_terminal, transient=True)
    with bar:
        if not console.is_terminal:
            print("evaluating ...", file=sys.stderr)
        task = bar.add_task("cases", total=count)
        yield lambda part: bar.advance(task)
