"""`window: dataset-percentiles`: one window for a data set, from the voxels of all its training cases."""

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


def settle_windows(
    jobs: Sequence[Job], workers: Workers, progress: Callable[[int, int], None]
) -> tuple[list[Job], dict[str, Window]]:
    """The jobs with a window in numbers, and these windows by the data set's name in the index.

    A data set without a readable case gets none: each case says why when it is staged.

    Args:
        progress: called with (cases counted, of).
    """
    by_dataset: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        if RULE in job.ref.settings.clip_windows:
            by_dataset[slug(job.ref.dataset)].append(job)
    # training cases, so that nothing of the others leaks into the window
    counted = [job for all_ in by_dataset.values() for job in [j for j in all_ if j.split == "train"] or all_]
    quantiles: dict[str, list[Quantiles]] = defaultdict(list)
    with closing(workers.run(quantiles_of, counted)) as results:
        for done, (job, of_case) in enumerate(results, start=1):
            progress(done, len(counted))
            if of_case is not None:
                quantiles[slug(job.ref.dataset)].append(of_case)
    windows: dict[str, Window] = {}
    for name, parts in quantiles.items():
        try:
            windows[name] = merge_quantiles(parts, by_dataset[name][0].ref.settings.percentiles)
        except CaseError:
            continue
    return [_with_window(job, windows.get(slug(job.ref.dataset))) for job in jobs], windows


def quantiles_of(job: Job) -> Quantiles:
    """Of one case; none of a case that cannot be read, which is reported when it is staged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CaseWarning)
            return case_quantiles(load_case(job.ref))
    except Exception:  # staging says why
        return Quantiles(0, ())


def _with_window(job: Job, window: Window | None) -> Job:
    settings = job.ref.settings
    if window is None or RULE not in settings.clip_windows:
        return job
    several = tuple(window if entry == RULE else entry for entry in settings.windows)
    one = window if settings.window == RULE else settings.window
    changed = settings.model_copy(update={"window": one, "windows": several})
    return replace(job, ref=replace(job.ref, settings=changed))
