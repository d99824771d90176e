"""`window: dataset-percentiles`: one window for a data set, from the voxels of all its training cases."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from medsam2.cases.case import CaseError
from medsam2.cases.geometry import CaseWarning
from medsam2.cases.intensity import Quantiles, case_quantiles, merge_quantiles
from medsam2.cases.settings import Window
from medsam2.files import atomic_write
from medsam2.shards.identity import slug
from medsam2.shards.pool import Workers
from medsam2.shards.stage import Job, staging_stamp

RULE = "dataset-percentiles"
COUNTED = "windows.json"

Step = Callable[[int, int], None]


def settle_windows(
    jobs: Sequence[Job], staging: Path, workers: Workers, progress: Step
) -> tuple[list[Job], dict[str, Window]]:
    """The jobs with a window in numbers, and these windows by the data set's name in the index.

    Args:
        progress: called with (cases counted, of).
    """
    by_dataset: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        if RULE in job.ref.settings.wanted_windows:
            by_dataset[slug(job.ref.dataset)].append(job)
    if not by_dataset:
        return list(jobs), {}
    # training cases, so that nothing of the others leaks into the window
    training = {name: [job for job in all_ if job.split == "train"] or all_ for name, all_ in by_dataset.items()}
    windows = _count(training, staging, workers, progress)
    return [_with_window(job, windows.get(slug(job.ref.dataset))) for job in jobs], windows


def _count(training: Mapping[str, Sequence[Job]], staging: Path, workers: Workers, progress: Step) -> dict[str, Window]:
    """Windows of the data sets whose training cases are given; one without a readable case gets none."""
    path = staging / COUNTED
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        kept = {}
    stamps = {name: _stamp(jobs) for name, jobs in training.items()}
    todo = [job for name, jobs in training.items() if kept.get(name, {}).get("stamp") != stamps[name] for job in jobs]
    found: dict[str, list[Quantiles]] = defaultdict(list)
    with closing(workers.run(quantiles_of, todo)) as results:
        for done, (job, quantiles) in enumerate(results, start=1):
            progress(done, len(todo))
            if quantiles is not None:
                found[slug(job.ref.dataset)].append(quantiles)
    for name, parts in found.items():
        try:
            window = merge_quantiles(parts, training[name][0].ref.settings.percentiles)
        except CaseError:
            continue  # each case says so when it is read
        kept[name] = {"stamp": stamps[name], "window": window}
    with atomic_write(path, "w") as file:
        json.dump(kept, file)
    return {name: (kept[name]["window"][0], kept[name]["window"][1]) for name in training if name in kept}


def quantiles_of(job: Job) -> Quantiles:
    """Of one case; none of a case that cannot be read, which is reported when it is staged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CaseWarning)
            return case_quantiles(job.ref.load())
    except Exception:  # staging says why
        return Quantiles(0, ())


def _stamp(jobs: Sequence[Job]) -> str:
    seen = sorted((job.case, staging_stamp(job)) for job in jobs)
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _with_window(job: Job, window: Window | None) -> Job:
    settings = job.ref.settings
    if window is None or RULE not in settings.wanted_windows:
        return job
    several = tuple(window if entry == RULE else entry for entry in settings.windows)
    one = window if settings.window == RULE else settings.window
    changed = settings.model_copy(update={"window": one, "windows": several})
    return replace(job, ref=replace(job.ref, settings=changed))
