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
     "relative_drop": {LABEL: SPAN},                 (clean - mean) / clean
     "error": {LABEL: float | null},                 corruption error in per cent of the first checkpoint's
     "relative_error": {LABEL: float | null}}        likewise of what is lost, the drop

with SPAN = {"mean": float | null, "low": float | null, "high": float | null}: a 95 % interval over patients, null with
fewer than three. Numbers are means over patients of each patient's own mean, as in `summary`.

The corruption error is Hendrycks & Dietterich's (2019, arXiv 1903.12261) with 1 - DSC for the error rate: the sum over
the severities by the same sum of the first checkpoint, which therefore has 100. In a total, `error` and
`relative_error` are means over its corruptions (the mCE and relative mCE), and a patient counts with the mean over the
corruptions that were tried on him.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medsam2.errors import UserError
from medsam2.evaluation.corruptions.registry import SUITES, registry
from medsam2.evaluation.intervals import FEWEST_PATIENTS, LEVEL, bootstrap_interval
from medsam2.evaluation.summary import TOTAL

if TYPE_CHECKING:
    import pandas as pd

OBJECT = ["protocol", "dataset", "case", "object"]
PATIENT = ["dataset", "patient"]


def summarise(frame: pd.DataFrame, labels: Sequence[str], seed: int = 0, resamples: int = 2000) -> list[dict[str, Any]]:
    """What `robustness` in summary.json holds (see the module's docstring); empty without a damaged row.

    Args:
        frame: rows as `quick.Row`, of undamaged images (corruption "", severity 0) and of damaged ones.
        labels: checkpoints in order; the first is the one that errors are relative to.

    Raises:
        UserError: there are damaged rows but no undamaged ones of the same objects.
    """
    damaged = frame[frame["corruption"] != ""]
    if damaged.empty:
        return []
    clean = frame[frame["corruption"] == ""]
    tables = {
        str(name): _by_patient(part, clean, labels, str(name))
        for name, part in damaged.groupby("corruption", sort=False)
    }
    known = registry()
    suites = {name: known[name].suite if name in known else "other" for name in tables}
    names = sorted(tables, key=lambda name: list(known).index(name) if name in known else len(known))
    found = [_entry({name: tables[name]}, labels, seed, resamples, name, suites[name]) for name in names]
    for suite in (*SUITES, "other"):
        members = {name: tables[name] for name in names if suites[name] == suite}
        if len(members) > 1 and len(members) < len(tables):
            found.append(_entry(members, labels, seed, resamples, TOTAL, suite))
    if len(tables) > 1:
        found.append(_entry({name: tables[name] for name in names}, labels, seed, resamples, TOTAL, TOTAL))
    return found


class _Table:
    """The scores of one corruption: `values` [patients, checkpoints, 1 + severities], the undamaged one first."""

    def __init__(self, values: pd.DataFrame, severities: list[int], counts: dict[str, int]) -> None:
        self.values, self.severities, self.counts = values, severities, counts


def _by_patient(part: pd.DataFrame, clean: pd.DataFrame, labels: Sequence[str], name: str) -> _Table:
    import pandas as pd

    severities = sorted({int(severity) for severity in part["severity"]})
    objects = part[OBJECT].drop_duplicates()
    both = pd.concat([clean.merge(objects, on=OBJECT), part])
    both = both[both["checkpoint"].isin(labels)]
    wide = both.pivot_table(index=[*OBJECT, "patient"], columns=["checkpoint", "severity"], values="dsc", sort=False)
    wanted = pd.MultiIndex.from_product([list(labels), [0, *severities]], names=["checkpoint", "severity"])
    complete = wide.reindex(columns=wanted).dropna()
    if complete.empty:
        raise UserError(
            f"corruption {name}: no object has a score on the undamaged image and at severities "
            f"{', '.join(map(str, severities))} for each of {', '.join(labels)}; run the undamaged cases too."
        )
    patients = complete.groupby(level=PATIENT, sort=True).mean()
    everyone = part[PATIENT].drop_duplicates()
    counts = {
        "cases": complete.index.to_frame(index=False)[["dataset", "case"]].drop_duplicates().shape[0],
        "patients": len(patients),
        "objects": complete.index.to_frame(index=False)[["dataset", "case", "object"]].drop_duplicates().shape[0],
        "left_out": len(everyone) - len(patients),
    }
    return _Table(patients, severities, counts)


def _entry(
    tables: dict[str, _Table], labels: Sequence[str], seed: int, resamples: int, name: str, suite: str
) -> dict[str, Any]:
    """One corruption (one table), or a total over several."""
    import pandas as pd

    severities = sorted(set.intersection(*(set(table.severities) for table in tables.values())))
    stacked = pd.concat([table.values for table in tables.values()])
    values = stacked.groupby(level=PATIENT, sort=True).mean()
    clean = {label: values[label][0].to_numpy() for label in labels}
    mean = {label: values[label].drop(columns=0).mean(axis=1).to_numpy() for label in labels}
    errors, relative_errors = zip(*(_errors(table, labels) for table in tables.values()), strict=True)
    counts = [table.counts for table in tables.values()]
    return {
        "corruption": name,
        "suite": suite,
        "cases": max(count["cases"] for count in counts),
        "patients": len(values),
        "objects": max(count["objects"] for count in counts),
        "left_out": max(count["left_out"] for count in counts),
        "severities": severities,
        "clean": {label: float(clean[label].mean()) for label in labels},
        "dsc": {label: [float(values[label][severity].mean()) for severity in severities] for label in labels},
        "mean": {label: float(mean[label].mean()) for label in labels},
        "drop": {label: _span(clean[label] - mean[label], seed, resamples) for label in labels},
        "relative_drop": {label: _relative(clean[label], mean[label], seed, resamples) for label in labels},
        "error": {label: _average([found[label] for found in errors]) for label in labels},
        "relative_error": {label: _average([found[label] for found in relative_errors]) for label in labels},
    }


def _errors(table: _Table, labels: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Corruption error and relative corruption error of one corruption, in per cent of the first checkpoint's."""
    means = {label: table.values[label].mean() for label in labels}
    wrong = {label: float((1 - means[label][table.severities]).sum()) for label in labels}
    lost = {label: float((means[label][0] - means[label][table.severities]).sum()) for label in labels}
    base, base_lost = wrong[labels[0]], lost[labels[0]]
    return (
        {label: 100 * wrong[label] / base if base > 0 else math.nan for label in labels},
        # A checkpoint that loses nothing, or gains, is no measure for another one
        {label: 100 * lost[label] / base_lost if base_lost > 0 else math.nan for label in labels},
    )


def _average(values: list[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else None


def _span(values: np.ndarray, seed: int, resamples: int) -> dict[str, float | None]:
    interval = bootstrap_interval(values, seed, resamples)
    low, high = interval or (None, None)
    return {"mean": float(values.mean()), "low": low, "high": high}


def _relative(clean: np.ndarray, mean: np.ndarray, seed: int, resamples: int) -> dict[str, float | None]:
    """(clean - mean) / clean, of the means over patients: a patient with a clean score of 0 has no ratio of his own."""
    from scipy.stats import bootstrap

    if not clean.mean() > 0:
        return {"mean": None, "low": None, "high": None}
    found: dict[str, float | None] = {"mean": float(1 - mean.mean() / clean.mean()), "low": None, "high": None}
    if len(clean) < FEWEST_PATIENTS:
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a resample of patients that all scored 0 has no ratio
        span = bootstrap(
            (clean, mean), lambda c, m, axis=-1: 1 - m.mean(axis) / c.mean(axis), paired=True, vectorized=True,
            n_resamples=resamples, confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    if math.isfinite(span.low) and math.isfinite(span.high):
        found["low"], found["high"] = float(span.low), float(span.high)
    return found
