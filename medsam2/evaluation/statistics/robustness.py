"""Robustness: the score on corrupted images by corruption and severity, for each checkpoint.

`summarise` returns one dictionary per corruption, one per suite with several corruptions, and one over all of them:

    {"corruption": NAME, "suite": NAME,              "all" in a total
     "cases": int, "patients": int, "objects": int,  with a clean and corrupted score for every checkpoint and severity
     "left_out": int,                                patients that lack one of these scores (a case failed)
     "severities": [int, ...],
     "clean": {LABEL: float},                        DSC of the clean images of the same objects
     "dsc": {LABEL: [float, ...]},                   one per severity
     "mean": {LABEL: float},                         over the severities
     "drop": {LABEL: SPAN},                          clean - mean
     "relative_drop": {LABEL: float | null},         (clean - mean) / clean, of the means over patients
     "error": {LABEL: float | null}}                 corruption error in per cent of the first checkpoint's

with SPAN = {"mean": float, "low": float | null, "high": float | null}: a 95 % interval over patients, null with fewer
than three. Numbers are means over patients of each patient's mean, as in `summary`.

The corruption error is Hendrycks & Dietterich's (2019, arXiv 1903.12261) with 1 - DSC as the error rate: the sum over
the severities, divided by the same sum of the first checkpoint, which therefore has 100. In a total, `error` is the
mean over its corruptions (the mCE), and a patient's score is the mean over the corruptions that applied to the patient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medsam2.errors import UserError
from medsam2.evaluation.corruptions.registry import CORRUPTIONS, SUITES
from medsam2.evaluation.statistics.intervals import mean_with_interval
from medsam2.evaluation.statistics.summary import TOTAL, mean_of_known

if TYPE_CHECKING:
    import pandas as pd

OBJECT = ["protocol", "dataset", "case", "object"]
PATIENT = ["dataset", "patient"]


def summarise(frame: pd.DataFrame, labels: Sequence[str], seed: int = 0, resamples: int = 2000) -> list[dict[str, Any]]:
    """Return `robustness` of summary.json (see the module's docstring); empty without corrupted rows.

    Args:
        frame: rows as `score_case.Row` of one protocol, of clean images (corruption "", severity 0) and corrupted ones.
        labels: checkpoints in order; errors are relative to the first.

    Raises:
        UserError: there are corrupted rows but no clean ones of the same objects.
    """
    clean = frame[frame["corruption"] == ""]
    corrupted = {str(name): part for name, part in frame[frame["corruption"] != ""].groupby("corruption")}
    suites = {name: entry.suite for name, entry in CORRUPTIONS.items() if name in corrupted}
    scores = {name: _by_object(corrupted[name], clean, labels, name) for name in suites}
    left_out = {
        name: len(corrupted[name][PATIENT].drop_duplicates()) - scores[name].groupby(level=PATIENT).ngroups
        for name in suites
    }
    groups = [(name, suite, [name]) for name, suite in suites.items()]
    for suite in SUITES:
        members = [name for name in suites if suites[name] == suite]
        if 1 < len(members) < len(suites):
            groups.append((TOTAL, suite, members))
    if len(suites) > 1:
        groups.append((TOTAL, TOTAL, list(suites)))
    return [
        {
            "corruption": title,
            "suite": suite,
            "left_out": max(left_out[name] for name in members),
            **_entry([scores[name] for name in members], labels, seed, resamples),
        }
        for title, suite, members in groups
    ]


def _by_object(part: pd.DataFrame, clean: pd.DataFrame, labels: Sequence[str], name: str) -> pd.DataFrame:
    """Scores of one corruption: one row per object, one column per checkpoint and severity (0 for the clean image).

    Objects that lack one of these scores are dropped.
    """
    import pandas as pd

    severities = sorted({int(severity) for severity in part["severity"]})
    both = pd.concat([clean.merge(part[OBJECT].drop_duplicates(), on=OBJECT), part])
    wide = both.pivot_table(index=[*OBJECT, "patient"], columns=["checkpoint", "severity"], values="dsc", sort=False)
    complete = wide.reindex(columns=pd.MultiIndex.from_product([labels, [0, *severities]])).dropna()
    if complete.empty:
        raise UserError(
            f"corruption {name}: no object has a score on the clean image and at severities "
            f"{', '.join(map(str, severities))} for each of {', '.join(labels)}; evaluate the clean cases too."
        )
    return complete


def _entry(scores: Sequence[pd.DataFrame], labels: Sequence[str], seed: int, resamples: int) -> dict[str, Any]:
    """The numbers of one corruption, or of a total over several."""
    import pandas as pd

    by_corruption = [table.groupby(level=PATIENT, sort=True).mean() for table in scores]
    values = pd.concat(by_corruption).groupby(level=PATIENT, sort=True).mean()
    severities = [severity for severity in values[labels[0]].columns if severity]
    clean = {label: values[label][0].to_numpy() for label in labels}
    mean = {label: values[label][severities].mean(axis=1).to_numpy() for label in labels}
    errors = [_errors(table.mean(), labels, severities) for table in by_corruption]
    return {
        "cases": max(table.index.droplevel(["protocol", "object", "patient"]).nunique() for table in scores),
        "patients": len(values),
        "objects": max(len(table) for table in scores),
        "severities": severities,
        "clean": {label: float(clean[label].mean()) for label in labels},
        "dsc": {label: [float(values[label][severity].mean()) for severity in severities] for label in labels},
        "mean": {label: float(mean[label].mean()) for label in labels},
        "drop": {label: mean_with_interval(clean[label] - mean[label], seed, resamples) for label in labels},
        # Of the means over patients, because a single patient may have a clean score of 0
        "relative_drop": {
            label: float(1 - mean[label].mean() / clean[label].mean()) if clean[label].mean() > 0 else None
            for label in labels
        },
        "error": {label: mean_of_known(np.array([error[label] for error in errors])) for label in labels},
    }


def _errors(means: pd.Series, labels: Sequence[str], severities: Sequence[int]) -> dict[str, float]:
    """Corruption error of one corruption, in per cent of the first checkpoint's."""
    sums = {label: float((1 - means[label][severities]).sum()) for label in labels}
    base = sums[labels[0]]
    return {label: 100 * sums[label] / base if base > 0 else math.nan for label in labels}
