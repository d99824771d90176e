"""Compute the window of `window: dataset-percentiles`, from the voxels of all training cases of a dataset."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

from medsam2.cases.case import CaseError
from medsam2.cases.geometry import CaseWarning
from medsam2.cases.intensity import Quantiles, case_quantiles, merge_quantiles
from medsam2.cases.layouts import load_case
from medsam2.cases.settings import Window
from medsam2.shards.prepare.pool import Workers
from medsam2.shards.prepare.pseudonyms import slug
from medsam2.shards.prepare.stage import Job

RULE = "dataset-percentiles"


def resolve_windows(
    jobs: Sequence[Job], workers: Workers, progress: Callable[[int, int], None]
) -> tuple[list[Job], dict[str, Window]]:
    """Replace the rule by the computed window in all jobs; returns the jobs, and the windows by dataset slug.

    A dataset without a readable case gets no window. Staging reports why its cases cannot be read.

    Args:
        progress: called with (number of cases read, total).
    """
    by_dataset: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        if RULE in job.ref.settings.clip_windows:
            by_dataset[slug(job.ref.dataset)].append(job)
    # Only training cases count where there are any, so that nothing leaks from the other splits.
    sampled = [job for jobs_ in by_dataset.values() for job in [j for j in jobs_ if j.split == "train"] or jobs_]
    quantiles: dict[str, list[Quantiles]] = defaultdict(list)
    with closing(workers.run(read_quantiles, sampled)) as results:
        for done, (job, case) in enumerate(results, start=1):
            progress(done, len(sampled))
            if case is not None:
                quantiles[slug(job.ref.dataset)].append(case)
    windows: dict[str, Window] = {}
    for name, parts in quantiles.items():
        try:
            windows[name] = merge_quantiles(parts, by_dataset[name][0].ref.settings.percentiles)
        except CaseError:
            continue
    return [_resolve_window(job, windows.get(slug(job.ref.dataset))) for job in jobs], windows


def read_quantiles(job: Job) -> Quantiles:
    """Read one case and compute its quantiles; they are empty if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CaseWarning)
            return case_quantiles(load_case(job.ref))
    except Exception:  # staging reports the error
        return Quantiles(0, ())


def _resolve_window(job: Job, window: Window | None) -> Job:
    settings = job.ref.settings
    if window is None or RULE not in settings.clip_windows:
        return job
    windows = tuple(window if entry == RULE else entry for entry in settings.windows)
    update = {"window": window if settings.window == RULE else settings.window, "windows": windows}
    return replace(job, ref=replace(job.ref, settings=settings.model_copy(update=update)))
