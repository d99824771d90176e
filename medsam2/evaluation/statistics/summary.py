"""From rows to groups: means, changes between checkpoints, and their intervals over patients.

`summarise` gives what `summary.json` holds as "groups": one GROUP a data set, modality and structure, then totals:

    {"dataset": NAME, "modality": NAME, "structure": NAME,   "all" in a total
     "cases": int, "patients": int, "objects": int, "leaks": int,   (cases that some checkpoint was trained on)
     SCORE: {LABEL: float | null},                    of each score in SCORES: dsc, nsd, hd95 ...
     SCORE_interval: {LABEL: [low, high] | null},     95 %, of that mean
     SCORE_change: CHANGE,                            null with one checkpoint
     "dsc_case", "iou_case": {LABEL: float | null},   mean over cases instead of patients
     "dsc_pooled", "iou_pooled": {LABEL: float | null},   from the voxels of all objects together
     "seconds": {LABEL: float | null},                mean over cases, of all objects predicted together with these
     "frames_per_second": {LABEL: float | null},      all frames over all seconds
     "peak_mb": {LABEL: float | null},                largest of all cases
     "sizes": [SIZE, ...]}                            small, medium, large; empty with too few objects

with CHANGE = {"from": LABEL, "to": LABEL, "mean": float, "low": float | null, "high": float | null}: the last
checkpoint against the first, on the same objects; and SIZE = {"size": NAME, "cases", "patients", "objects", "leaks",
"dsc", "dsc_interval", "dsc_change", "nsd" ...}: the scores of SIZE_SCORES alone. null is a score that was not computed
or that no object has, and a distance where the mean would be of millimetres and pixels.

Unless its name says otherwise a number is the mean over patients of each patient's own mean, so that a patient with
many lesions counts once and a change is the difference of the two means beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from medsam2.evaluation.statistics.intervals import mean_intervals

if TYPE_CHECKING:
    import pandas as pd

TOTAL = "all"
SIZES = ("small", "medium", "large")
FEWEST_OBJECTS = 9  # three a size: below it the sizes are names of single objects

SCORES = (
    "dsc", "iou", "nsd", "hd95", "assd", "volume_error", "volume_error_abs", "j", "f", "jf", "cldice", "instance_f1",
    "present_dsc", "present_iou", "prompt_dsc", "other_dsc", "absent_empty", "noc85", "noc90",
)  # fmt: skip
COLUMNS = {"absent_empty": "absent_empty_share"}  # where the column of a row has another name
DISTANCES = ("hd95", "assd")  # in mm for volumes, in pixels for clips and stills
SIZE_SCORES = ("dsc", "nsd", "hd95")
_COUNTS = ("voxels", "voxels_predicted", "voxels_both")


def summarise(rows: pd.DataFrame, checkpoints: list[str], seed: int, resamples: int) -> list[dict[str, Any]]:
    """The groups of `summary.json` (see the module's docstring) from one row an object and checkpoint.

    Args:
        rows: one a `quick.Row`, of one protocol; a column that the table lacks counts as not computed.
        checkpoints: labels in order; the first is the baseline of the changes.
    """
    needed = [*(COLUMNS.get(name, name) for name in SCORES), *_COUNTS, "object", "frames", "seconds", "peak_mb"]
    rows = rows.reindex(columns=rows.columns.union(needed, sort=False))
    rows = rows.assign(size=size_classes(rows), volume_error_abs=rows["volume_error"].abs())
    groups = []
    for (dataset, modality, structure), part in parts(rows):
        if mixed_units(part):
            part = part.assign(**dict.fromkeys(DISTANCES, math.nan))
        group = {"dataset": dataset, "modality": modality, "structure": structure, **_counts(part, checkpoints)}
        group |= _means(part, SCORES, checkpoints, seed, resamples)
        group |= _averages(part, checkpoints) | _costs(part, checkpoints)
        group["sizes"] = [
            {"size": size, **_counts(own, checkpoints), **_means(own, SIZE_SCORES, checkpoints, seed, resamples)}
            for size in SIZES
            if len(own := part[part["size"] == size])
        ]
        groups.append(group)
    return groups


def parts(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, str, str], pd.DataFrame]]:
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


def size_classes(rows: pd.DataFrame) -> pd.Series:
    """small, medium or large for each row: terciles of the truth's voxels within data set, modality and structure.

    Sizes are compared only where a voxel means the same. An object of the size of a limit belongs to the smaller
    class. Empty where there are fewer than nine objects, or too few different sizes for three classes.
    """
    import pandas as pd

    names = pd.Series("", index=rows.index, dtype=object)
    if "voxels" not in rows or "object" not in rows:
        return names
    for _, part in rows.groupby(["dataset", "modality", "structure"]):
        objects = part.drop_duplicates(["dataset", "case", "object"])["voxels"].dropna()
        if len(objects) < FEWEST_OBJECTS:
            continue
        limits = np.quantile(objects, [1 / 3, 2 / 3], method="lower")
        found = np.searchsorted(limits, part["voxels"], side="left")
        if len(set(found)) == len(SIZES):
            names.loc[part.index] = np.array(SIZES, object)[found]
    return names


def mixed_units(part: pd.DataFrame) -> bool:
    """Whether distances of these rows are in millimetres (volumes) and in pixels (clips and stills)."""
    return "kind" in part and (part["kind"] == "volume").nunique() > 1


def patient_means(part: pd.DataFrame, columns: list[str], checkpoints: list[str]) -> np.ndarray:
    """The mean of each patient's objects: float [patients, columns, checkpoints], NaN where there is none."""
    import pandas as pd

    means = part.groupby(["dataset", "patient", "checkpoint"])[columns].mean().unstack("checkpoint")
    wide = means.reindex(columns=pd.MultiIndex.from_product([columns, checkpoints]))
    return wide.to_numpy(dtype=float).reshape(len(wide), len(columns), len(checkpoints))


def _counts(part: pd.DataFrame, checkpoints: list[str]) -> dict[str, int]:
    one = part[part["checkpoint"] == checkpoints[0]]
    return {
        "cases": len(one[["dataset", "case"]].drop_duplicates()),
        "patients": len(one[["dataset", "patient"]].drop_duplicates()),
        "objects": len(one),
        "leaks": len(part[part["leak"]][["dataset", "case"]].drop_duplicates()),
    }


def _means(
    part: pd.DataFrame, scores: tuple[str, ...], checkpoints: list[str], seed: int, resamples: int
) -> dict[str, Any]:
    """Mean, interval and change of each score: all intervals of a group from the same resamples."""
    values = patient_means(part, [COLUMNS.get(name, name) for name in scores], checkpoints)
    change = values[:, :, -1] - values[:, :, 0]
    columns = np.concatenate([values, change[:, :, None]], axis=2)  # [patients, scores, checkpoints + 1]
    intervals = mean_intervals(columns.reshape(len(columns), -1), seed, resamples)
    group: dict[str, Any] = {}
    for place, name in enumerate(scores):
        own = intervals[place * (len(checkpoints) + 1) :]
        means = [_mean(column) for column in columns[:, place].T]
        group[name] = dict(zip(checkpoints, means, strict=False))
        group[f"{name}_interval"] = {
            label: list(interval) if interval else None for label, interval in zip(checkpoints, own, strict=False)
        }
        low, high = own[len(checkpoints)] or (None, None)
        group[f"{name}_change"] = (
            {"from": checkpoints[0], "to": checkpoints[-1], "mean": means[-1], "low": low, "high": high}
            if len(checkpoints) > 1
            else None
        )
    return group


def _averages(part: pd.DataFrame, checkpoints: list[str]) -> dict[str, dict[str, float | None]]:
    """Per case and pooled: other averages of the same scores, under names of their own."""
    cases = part.groupby(["checkpoint", "dataset", "case"])[["dsc", "iou"]].mean().groupby("checkpoint").mean()
    sums = part.groupby("checkpoint")[list(_COUNTS)].sum(min_count=1)
    total, both = sums["voxels"] + sums["voxels_predicted"], sums["voxels_both"]
    found = {
        "dsc_case": cases["dsc"],
        "iou_case": cases["iou"],
        "dsc_pooled": 2 * both / total,
        "iou_pooled": both / (total - both),
    }
    return {name: _by_label(column, checkpoints) for name, column in found.items()}


def _costs(part: pd.DataFrame, checkpoints: list[str]) -> dict[str, dict[str, float | None]]:
    """Time and memory: objects that were predicted together tell the same time, which counts once."""
    keys = ["checkpoint", "dataset", "case"]
    batches = part.drop_duplicates([*keys, "seconds"]).groupby(keys)
    cases = batches.agg({"frames": "max", "seconds": lambda times: times.sum(min_count=1), "peak_mb": "max"})
    by_label = cases.groupby("checkpoint")
    sums = by_label[["frames", "seconds"]].sum(min_count=1)
    found = {
        "seconds": by_label["seconds"].mean(),
        "frames_per_second": sums["frames"] / sums["seconds"],
        "peak_mb": by_label["peak_mb"].max(),
    }
    return {name: _by_label(column, checkpoints) for name, column in found.items()}


def _by_label(column: pd.Series, checkpoints: list[str]) -> dict[str, float | None]:
    return {label: _number(float(column.get(label, math.nan))) for label in checkpoints}


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _number(value: float) -> float | None:
    """NaN is no JSON."""
    return value if math.isfinite(value) else None
