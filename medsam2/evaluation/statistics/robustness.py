"""How much of the score is left on damaged images: by corruption and severity, for each checkpoint.

`summarise` gives one dictionary a corruption, then one a suite with several corruptions, then one of all of them:

    {"corruption": NAME, "suite": NAME,              "all" where it is a total
     "cases": int, "patients": int, "objects": int,  with a score, clean and damaged, for every checkpoint and severity
     "left_out": int,                                patients without all of them (a case failed)
     "severities": [int, ...],
     "clean": {LABEL: float},                        DSC of the undamaged images of the same objects
     "dsc": {LABEL: [float, ...]},                   one a severity
     "mean": {LABEL: float},                         over the severities
     "drop": {LABEL: SPAN},                          clean - mean
     "relative_drop": {LABEL: float | null},         (clean - mean) / clean, of the means over patients
     "error": {LABEL: float | null}}                 corruption error in per cent of the first checkpoint's

with SPAN = {"mean": float, "low": float | null, "high": float | null}: a 95 % interval over patients, null with fewer
than three. Numbers are means over patients of each patient's own mean, as in `summary`.

The corruption error is Hendrycks & Dietterich's (2019, arXiv 1903.12261) with 1 - DSC for the error rate: the sum over
the severities by the same sum of the first checkpoint, which therefore has 100. In a total, `error` is
the mean over its corruptions (the mCE), and a patient counts with the mean over the corruptions that were tried on him.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medsam2.errors import UserError
from medsam2.evaluation.corruptions.registry import SUITES, registry
from medsam2.evaluation.statistics.intervals import bootstrap_interval
from medsam2.evaluation.statistics.summary import TOTAL

if TYPE_CHECKING:
    import pandas as pd

OBJECT = ["protocol", "dataset", "case", "object"]
PATIENT = ["dataset", "patient"]


def summarise(frame: pd.DataFrame, labels: Sequence[str], seed: int = 0, resamples: int = 2000) -> list[dict[str, Any]]:
    """What `robustness` in summary.json holds (see the module's docstring); empty without a damaged row.

    Args:
        frame: rows as `quick.Row` of one protocol, of undamaged images (corruption "", severity 0) and of damaged ones.
        labels: checkpoints in order; the first is the one that errors are relative to.

    Raises:
        UserError: there are damaged rows but no undamaged ones of the same objects.
    """
    clean = frame[frame["corruption"] == ""]
    damaged = {str(name): part for name, part in frame[frame["corruption"] != ""].groupby("corruption")}
    suites = {name: entry.suite for name, entry in registry().items() if name in damaged}
    scores = {name: _by_patient(damaged[name], clean, labels, name) for name in suites}
    left_out = {name: len(damaged[name][PATIENT].drop_duplicates()) - _num_patients(scores[name]) for name in suites}
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


def _by_patient(part: pd.DataFrame, clean: pd.DataFrame, labels: Sequence[str], name: str) -> pd.DataFrame:
    """The scores of one corruption: a row an object, a column a checkpoint and severity, the undamaged image's first.

    Objects without all of these are left out.
    """
    import pandas as pd

    severities = sorted({int(severity) for severity in part["severity"]})
    both = pd.concat([clean.merge(part[OBJECT].drop_duplicates(), on=OBJECT), part])
    wide = both.pivot_table(index=[*OBJECT, "patient"], columns=["checkpoint", "severity"], values="dsc", sort=False)
    complete = wide.reindex(columns=pd.MultiIndex.from_product([labels, [0, *severities]])).dropna()
    if complete.empty:
        raise UserError(
            f"corruption {name}: no object has a score on the undamaged image and at severities "
            f"{', '.join(map(str, severities))} for each of {', '.join(labels)}; run the undamaged cases too."
        )
    return complete


def _num_patients(scores: pd.DataFrame) -> int:
    return scores.groupby(level=PATIENT).ngroups


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
        "drop": {label: _span(clean[label] - mean[label], seed, resamples) for label in labels},
        # Of the means over patients: a patient with a clean score of 0 has no ratio of his own
        "relative_drop": {
            label: float(1 - mean[label].mean() / clean[label].mean()) if clean[label].mean() > 0 else None
            for label in labels
        },
        "error": {label: _average([error[label] for error in errors]) for label in labels},
    }


def _errors(means: pd.Series, labels: Sequence[str], severities: Sequence[int]) -> dict[str, float]:
    """Corruption error of one corruption, in per cent of the first checkpoint's."""
    wrong = {label: float((1 - means[label][severities]).sum()) for label in labels}
    base = wrong[labels[0]]
    return {label: 100 * wrong[label] / base if base > 0 else math.nan for label in labels}


def _average(values: list[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else None


def _span(values: np.ndarray, seed: int, resamples: int) -> dict[str, float | None]:
    low, high = bootstrap_interval(values, seed, resamples) or (None, None)
    return {"mean": float(values.mean()), "low": low, "high": high}
