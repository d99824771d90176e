"""Windows that depend on a whole data set: the percentiles of all its training cases, found before anything is staged."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from medsam2.cases.case import CaseError
from medsam2.cases.geometry import CaseWarning
from medsam2.cases.intensity import Quantiles, case_quantiles, merge_quantiles
from medsam2.cases.settings import DatasetSettings, Window
from medsam2.shards.identity import slug
from medsam2.shards.stage import Job

RULE = "dataset-percentiles"
Measure = Callable[[Sequence[Job]], Iterable[tuple[Job, Quantiles | None]]]


def quantiles_of(job: Job) -> Quantiles | None:
    """The intensities of one case; None where it cannot be read (staging will say why)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CaseWarning)
            return case_quantiles(job.ref.load())
    except CaseError:
        return None


def measure_here(jobs: Sequence[Job]) -> Iterable[tuple[Job, Quantiles | None]]:
    """One case after another, in this process."""
    for job in jobs:
        yield job, quantiles_of(job)


def with_dataset_windows(
    jobs: Sequence[Job], known: dict[str, Window], measure: Measure = measure_here
) -> tuple[list[Job], dict[str, Window]]:
    """Jobs whose rule `dataset-percentiles` became numbers, and these numbers by data set (as it stands in keys).

    Args:
        known: windows that are published already; they hold for cases that are added.
        measure: how the cases are read, e.g. by several processes; may yield in any order.
    """
    windows = dict(known)
    asking: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        if RULE in job.ref.settings.wanted_windows and slug(job.ref.dataset) not in windows:
            asking[slug(job.ref.dataset)].append(job)
    chosen = [job for group in asking.values() for job in _training(group)]
    parts: dict[str, list[Quantiles]] = defaultdict(list)
    for job, found in measure(chosen):
        if found is not None and found.count:
            parts[slug(job.ref.dataset)].append(found)
    for dataset, group in asking.items():
        if parts[dataset]:
            windows[dataset] = merge_quantiles(parts[dataset], group[0].ref.settings.percentiles)
    return [_resolved(job, windows) for job in jobs], windows


def _training(jobs: Sequence[Job]) -> Sequence[Job]:
    """The training cases, so that nothing of the others leaks into the window; all where there are none."""
    return [job for job in jobs if job.split == "train"] or jobs


def _resolved(job: Job, windows: dict[str, Window]) -> Job:
    settings = job.ref.settings
    window = windows.get(slug(job.ref.dataset))
    if RULE not in settings.wanted_windows or window is None:
        return job
    several = tuple(window if entry == RULE else entry for entry in settings.windows)
    one = window if settings.window == RULE else settings.window
    changed: DatasetSettings = settings.model_copy(update={"window": one, "windows": several})
    return replace(job, ref=replace(job.ref, settings=changed))
