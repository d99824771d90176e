"""From rows to groups: means, changes between checkpoints, and their intervals over patients.

`summarise` gives what `summary.json` holds:

    {"protocol": NAME, "source": PATH, "grid": "stored" | "native", "split": NAME,
     "checkpoints": [LABEL, ...],                     in the order given; the first is the baseline
     "bootstrap": {"seed": int, "resamples": int, "level": 0.95},
     "tolerance": {"mm": float, "px": float},
     "leaks": {LABEL: number of cases that the checkpoint was trained on},
     "failed": int,                                   cases that could not be read
     "groups": [GROUP, ...]}                          one a data set, modality and structure, then totals

and a GROUP is

    {"dataset": NAME, "modality": NAME, "structure": NAME,   "all" in a total
     "cases": int, "patients": int, "objects": int, "leaks": int,   (cases that some checkpoint was trained on)
     "dsc": {LABEL: float}, "nsd": {LABEL: float}, "absent_empty": {LABEL: float | null},
     "dsc_change": CHANGE, "nsd_change": CHANGE}      null with one checkpoint

with CHANGE = {"from": LABEL, "to": LABEL, "mean": float, "low": float | null, "high": float | null}: the last
checkpoint against the first, on the same objects. Every number is the mean over patients of each patient's own mean,
so that a patient with many lesions counts once and a change is the difference of the two means beside it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.95
TOTAL = "all"
FEWEST_PATIENTS = 3  # below it an interval would only look like one


def bootstrap_interval(values: np.ndarray, seed: int, resamples: int) -> tuple[float, float] | None:
    """95 % interval of the mean of `values` (one a patient): BCa (Efron 1987), percentile where BCa is undefined.

    None with fewer than three values.
    """
    from scipy.stats import bootstrap

    if len(values) < FEWEST_PATIENTS:
        return None
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a degenerate BCa warns and gives NaN: then the percentiles are taken
            found = bootstrap(
                (values,), np.mean, n_resamples=resamples, confidence_level=LEVEL, method=method,
                rng=np.random.default_rng(seed), vectorized=True,
            ).confidence_interval  # fmt: skip
        if math.isfinite(found.low) and math.isfinite(found.high):
            return float(found.low), float(found.high)
    return None


def summarise(rows: pd.DataFrame, checkpoints: list[str], seed: int, resamples: int) -> list[dict[str, Any]]:
    """The groups of `summary.json` (see the module's docstring) from one row an object and checkpoint."""
    return [
        {"dataset": dataset, "modality": modality, "structure": structure, **_group(part, checkpoints, seed, resamples)}
        for (dataset, modality, structure), part in _parts(rows)
    ]


def _parts(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, str, str], pd.DataFrame]]:
    """Data set, modality and structure; then each modality, each structure over several modalities, and everything."""
    for keys, part in rows.groupby(["modality", "dataset", "structure"], sort=True):
        modality, dataset, structure = keys
        yield (dataset, modality, structure), part
    for modality, part in rows.groupby("modality", sort=True):
        yield (TOTAL, str(modality), TOTAL), part
    for structure, part in rows.groupby("structure", sort=True):
        if part["modality"].nunique() > 1:
            yield (TOTAL, TOTAL, str(structure)), part
    yield (TOTAL, TOTAL, TOTAL), rows


def _group(part: pd.DataFrame, checkpoints: list[str], seed: int, resamples: int) -> dict[str, Any]:
    one = part[part["checkpoint"] == checkpoints[0]]
    group: dict[str, Any] = {
        "cases": int(one[["dataset", "case"]].drop_duplicates().shape[0]),
        "patients": int(one[["dataset", "patient"]].drop_duplicates().shape[0]),
        "objects": int(len(one)),
        "leaks": int(part[part["leak"]][["dataset", "case"]].drop_duplicates().shape[0]),
    }
    for name, column in (("dsc", "dsc"), ("nsd", "nsd"), ("absent_empty", "absent_empty_share")):
        by_patient = _by_patient(part, column, checkpoints)
        group[name] = {label: _number(by_patient[label].mean()) for label in checkpoints}
        if name != "absent_empty":
            group[f"{name}_change"] = _change(by_patient, checkpoints, seed, resamples)
    return group


def _by_patient(part: pd.DataFrame, column: str, checkpoints: list[str]) -> pd.DataFrame:
    """One row a patient, one column a checkpoint: the mean over the patient's objects."""
    wide = part.pivot_table(index=["dataset", "patient"], columns="checkpoint", values=column, aggfunc="mean")
    return wide.reindex(columns=checkpoints)


def _change(by_patient: pd.DataFrame, checkpoints: list[str], seed: int, resamples: int) -> dict[str, Any] | None:
    if len(checkpoints) < 2:
        return None
    first, last = checkpoints[0], checkpoints[-1]
    difference = (by_patient[last] - by_patient[first]).dropna().to_numpy(dtype=float)
    interval = bootstrap_interval(difference, seed, resamples)
    return {
        "from": first,
        "to": last,
        "mean": _number(difference.mean()) if len(difference) else None,
        "low": interval[0] if interval else None,
        "high": interval[1] if interval else None,
    }


def _number(value: float) -> float | None:
    """NaN is no JSON."""
    return float(value) if math.isfinite(value) else None
