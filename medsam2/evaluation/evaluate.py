"""`evaluate.py`: score every case with every checkpoint, protocol and corruption, then write tables and pictures.

settings ──> cases, checkpoints ──> parts/ (`run.cases`: each rank finishes its share of the cases)
         ──> rows ──> summary ──> cases.*, summary.*, failures.csv, overlays/, worst/, report.html (`report.results`)
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
from medsam2.evaluation.run.checkpoints import LoadedCheckpoint, load_checkpoints
from medsam2.evaluation.run.ranks import SINGLE_RANK, Rank, rank_barrier
from medsam2.evaluation.run.resume import PARTS, CaseResults, refuse_existing
from medsam2.evaluation.run.sources import list_cases
from medsam2.evaluation.settings import EvaluateSettings

if TYPE_CHECKING:
    from medsam2.cases.settings import SettingsBook

RESULT_FIELDS = {"metrics", "memory", "precision"}
"""Settings on which the results of a case depend, besides those that `_result_settings` converts."""
NOISE = "from the content of each case"
"""Where the random numbers of corruptions come from; earlier versions took them from salted names."""


def evaluate(settings: EvaluateSettings, rank: Rank = SINGLE_RANK) -> Report:
    """Score `settings.checkpoint` on `settings.data.source`, print the tables and write the output folder.

    Args:
        rank: rank 0 of the ranks that share the cases; the others call `evaluate_share`.

    Raises:
        UserError: a path, split, structure or device does not exist, the output folder exists, too many cases failed
            (all files are written first), or other ranks did not finish.
    """
    run = evaluate_share(settings, rank)
    run.results.load()
    missing = sum(run.results.find(name.key, name.state) is None for name in run.names)
    if missing:
        raise UserError(
            f"output={settings.output}: {missing} of {run.cases.count} cases are in no {PARTS}/rank-N.jsonl; run the "
            "same command on every rank, with an output folder that all of them share, and resume=true."
        )
    return write_results(run)


def evaluate_share(settings: EvaluateSettings, rank: Rank) -> Run:
    """Evaluate this rank's share of the cases and return when all ranks have finished theirs.

    Raises:
        UserError: as in `evaluate`.
    """
    with rank_barrier(rank) as barrier:
        if rank.leads:
            refuse_existing(Path(settings.output), settings.resume or rank.restarted)
        data, book = settings.data, None
        if data.config is not None:
            from medsam2.cases.settings import read_settings

            book = read_settings(Path(data.config), flag="data.config=")
        raw_options = (data.layout, data.modality, book)
        cases = list_cases(data.source, settings.split, settings.limit, settings.structures, *raw_options)
        checkpoints = load_checkpoints(settings, rank)
        results = CaseResults(Path(settings.output), _result_settings(settings, checkpoints, book))
        run = Run(settings, cases, cases.names(), checkpoints, results)
        if rank.leads:
            results.begin()
        barrier()
        numbers = run.unfinished()
        barrier()  # so that no rank adds a case before all ranks have listed the missing ones
        share = numbers[rank.index :: rank.count]
        print(f"rank {rank.index}: {len(share)} of {run.cases.count} cases to evaluate", file=sys.stderr)
        bar = track(share, "evaluating", console=Console(stderr=True), transient=True, disable=not rank.leads)
        run_cases(run, bar, rank.index)
        barrier()
    return run


def _result_settings(
    settings: EvaluateSettings, checkpoints: list[LoadedCheckpoint], book: SettingsBook | None
) -> dict[str, Any]:
    """The settings on which the rows depend. They contain no paths, so the folders may be moved.

    Names and values are those of earlier versions, so that `resume=true` continues what one of them began. An
    evaluation with corruptions has one more, since its earlier rows have other noise.
    """
    from medsam2 import __version__

    corruption = settings.corruption.model_dump(mode="json") if settings.corruption.names else None
    return {
        "version": __version__,
        "checkpoint": [[c.info.label, c.info.weights, c.info.image_size] for c in checkpoints],
        "protocols": [protocol.model_dump(mode="json", exclude={"citation"}) for protocol in settings.all_protocols],
        "data": [settings.data.layout, settings.data.modality, book and book.model_dump(mode="json")],
        "corruption": corruption,
        "seed": settings.seed if corruption else None,
        "compile": sorted(settings.compile),
        "structures": sorted(settings.structures),
        "pictures": [settings.overlays, settings.worst],
        **settings.model_dump(mode="json", include=RESULT_FIELDS),
        **({"noise": NOISE} if corruption else {}),
    }
