"""Summarises rows by group: means, changes between checkpoints, and their intervals over patients.

`summarise` returns "groups" of `summary.json`: one GROUP per dataset, modality and structure, then totals:

    {"dataset": NAME, "modality": NAME, "structure": NAME,   "all" in a total
     "cases": int, "patients": int, "objects": int, "leaks": int,   (cases that some checkpoint was trained on)
     SCORE: {LABEL: float | null},                    of each score in SCORES: dsc, nsd, hd95 ...
     SCORE_interval: {LABEL: [low, high] | null},     95 %, of that mean
     SCORE_change: CHANGE,                            null with one checkpoint
     "dsc_case", "iou_case": {LABEL: float | null},   mean over cases instead of patients
     "dsc_pooled", "iou_pooled": {LABEL: float | null},   from the voxels of all objects together
     "seconds": {LABEL: float | null},                mean over cases, of the batches that contain these objects
     "frames_per_second": {LABEL: float | null},      number of frames divided by seconds, over all cases
     "peak_mb": {LABEL: float | null},                maximum over cases
     "sizes": [SIZE, ...]}                            small, medium, large; empty with too few objects

with CHANGE = {"from": LABEL, "to": LABEL, "mean": float, "low": float | null, "high": float | null}: the last
checkpoint against the first, on the same objects; and SIZE = {"size": NAME, "cases", "patients", "objects", "leaks",
"dsc", "dsc_interval", "dsc_change", "nsd" ...}: the scores of SIZE_SCORES only. A score is null if it was not computed,
if no object has it, or if it would be a mean of millimetres and pixels.

Unless its name says otherwise, a number is the mean over patients of each patient's mean. A patient with many lesions
thus counts once, and a change is the difference of the two means beside it.
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
MIN_OBJECTS_FOR_SIZES = 9  # three per size class

SCORES = (
    "dsc", "iou", "nsd", "hd95", "assd", "volume_error", "volume_error_abs", "j", "f", "jf", "cldice", "instance_f1",
    "present_dsc", "present_iou", "prompt_dsc", "other_dsc", "absent_empty", "noc85", "noc90",
)  # fmt: skip
COLUMNS = {"absent_empty": "absent_empty_share"}  # score -> column, if the names differ
DISTANCES = ("hd95", "assd")  # in mm for volumes, in pixels for clips and stills
SIZE_SCORES = ("dsc", "nsd", "hd95")
_COUNTS = ("voxels", "voxels_predicted", "voxels_both")


def summarise(rows: pd.DataFrame, checkpoints: list[str], seed: int, resamples: int) -> list[dict[str, Any]]:
    """Summarise the rows of one protocol as "groups" of `summary.json` (see the module's docstring).

    Args:
        rows: one per `score_case.Row`, of one protocol; missing columns count as not computed.
        checkpoints: labels in order; the first is the baseline of the changes.
    """
    needed = [*(COLUMNS.get(name, name) for name in SCORES), *_COUNTS, "object", "frames", "seconds", "peak_mb"]
    rows = rows.reindex(columns=rows.columns.union(needed, sort=False))
    rows = rows.assign(size=size_classes(rows), volume_error_abs=rows["volume_error"].abs())
    groups = []
    for (dataset, modality, structure), part in iter_groups(rows):
        if mixed_units(part):
            part = part.assign(**dict.fromkeys(DISTANCES, math.nan))
        group = {"dataset": dataset, "modality": modality, "structure": structure, **_counts(part, checkpoints)}
        group |= _means(part, SCORES, checkpoints, seed, resamples)
        group |= _averages(part, checkpoints) | _costs(part, checkpoints)
        group["sizes"] = [
            {"size": size, **_counts(sized, checkpoints), **_means(sized, SIZE_SCORES, checkpoints, seed, resamples)}
            for size in SIZES
            if len(sized := part[part["size"] == size])
        ]
        groups.append(group)
    return groups


def iter_groups(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, str, str], pd.DataFrame]]:
    """Yield ((dataset, modality, structure), rows) of each group, then of the totals.

    Totals are: each modality, each structure that several modalities share, and all rows.
    """
    for (modality, dataset, structure), part in rows.groupby(["modality", "dataset", "structure"], sort=True):
        yield (dataset, modality, structure), part
    for modality, part in rows.groupby("modality", sort=True):
        yield (TOTAL, str(modality), TOTAL), part
    for structure, part in rows.groupby("structure", sort=True):
        if part["modality"].nunique() > 1:
            yield (TOTAL, TOTAL, str(structure)), part
    yield (TOTAL, TOTAL, TOTAL), rows


def size_classes(rows: pd.DataFrame) -> pd.Series:
    """Classify each row as small, medium or large: terciles of true voxels within dataset, modality and structure.

    Sizes are compared only within a group, where voxels are comparable. An object exactly at a limit belongs to the
    smaller class. The class is "" with fewer than nine objects, or too few different sizes for three classes.
    """
    import pandas as pd

    names = pd.Series("", index=rows.index, dtype=object)
    if "voxels" not in rows or "object" not in rows:
        return names
    for _, part in rows.groupby(["dataset", "modality", "structure"]):
        objects = part.drop_duplicates(["dataset", "case", "object"])["voxels"].dropna()
        if len(objects) < MIN_OBJECTS_FOR_SIZES:
            continue
        limits = np.quantile(objects, [1 / 3, 2 / 3], method="lower")
        classes = np.searchsorted(limits, part["voxels"], side="left")
        if len(set(classes)) == len(SIZES):
            names.loc[part.index] = np.array(SIZES, object)[classes]
    return names


def mixed_units(part: pd.DataFrame) -> bool:
    """Whether these rows mix distances in millimetres (volumes) and in pixels (clips and stills)."""
    return "kind" in part and (part["kind"] == "volume").nunique() > 1


def patient_means(part: pd.DataFrame, columns: list[str], checkpoints: list[str]) -> np.ndarray:
    """Mean over each patient's objects: float [patients, columns, checkpoints], NaN without objects."""
    import pandas as pd

    means = part.groupby(["dataset", "patient", "checkpoint"])[columns].mean().unstack("checkpoint")
    wide = means.reindex(columns=pd.MultiIndex.from_product([columns, checkpoints]))
    return wide.to_numpy(dtype=float).reshape(len(wide), len(columns), len(checkpoints))


def _counts(part: pd.DataFrame, checkpoints: list[str]) -> dict[str, int]:
    rows = part[part["checkpoint"] == checkpoints[0]]
    return {
        "cases": len(rows[["dataset", "case"]].drop_duplicates()),
        "patients": len(rows[["dataset", "patient"]].drop_duplicates()),
        "objects": len(rows),
        "leaks": len(part[part["leak"]][["dataset", "case"]].drop_duplicates()),
    }


def _means(
    part: pd.DataFrame, scores: tuple[str, ...], checkpoints: list[str], seed: int, resamples: int
) -> dict[str, Any]:
    """Mean, interval and change of each score; all intervals of a group use the same resamples."""
    values = patient_means(part, [COLUMNS.get(name, name) for name in scores], checkpoints)
    change = values[:, :, -1] - values[:, :, 0]
    columns = np.concatenate([values, change[:, :, None]], axis=2)  # [patients, scores, checkpoints + 1]
    intervals = mean_intervals(columns.reshape(len(columns), -1), seed, resamples)
    group: dict[str, Any] = {}
    for place, name in enumerate(scores):
        score_intervals = intervals[place * (len(checkpoints) + 1) :]
        means = [mean_of_known(column) for column in columns[:, place].T]
        group[name] = dict(zip(checkpoints, means, strict=False))
        group[f"{name}_interval"] = {
            label: list(interval) if interval else None
            for label, interval in zip(checkpoints, score_intervals, strict=False)
        }
        low, high = score_intervals[len(checkpoints)] or (None, None)
        group[f"{name}_change"] = (
            {"from": checkpoints[0], "to": checkpoints[-1], "mean": means[-1], "low": low, "high": high}
            if len(checkpoints) > 1
            else None
        )
    return group


def _averages(part: pd.DataFrame, checkpoints: list[str]) -> dict[str, dict[str, float | None]]:
    """DSC and IoU averaged over cases, and pooled over the voxels of all objects."""
    cases = part.groupby(["checkpoint", "dataset", "case"])[["dsc", "iou"]].mean().groupby("checkpoint").mean()
    sums = part.groupby("checkpoint")[list(_COUNTS)].sum(min_count=1)
    total, both = sums["voxels"] + sums["voxels_predicted"], sums["voxels_both"]
    averages = {
        "dsc_case": cases["dsc"],
        "iou_case": cases["iou"],
        "dsc_pooled": 2 * both / total,
        "iou_pooled": both / (total - both),
    }
    return {name: _by_label(column, checkpoints) for name, column in averages.items()}


def _costs(part: pd.DataFrame, checkpoints: list[str]) -> dict[str, dict[str, float | None]]:
    """Time and memory. Objects of one batch report the same time, which counts once."""
    keys = ["checkpoint", "dataset", "case"]
    batches = part.drop_duplicates([*keys, "seconds"]).groupby(keys)
    cases = batches.agg({"frames": "max", "seconds": lambda times: times.sum(min_count=1), "peak_mb": "max"})
    by_label = cases.groupby("checkpoint")
    sums = by_label[["frames", "seconds"]].sum(min_count=1)
    costs = {
        "seconds": by_label["seconds"].mean(),
        "frames_per_second": sums["frames"] / sums["seconds"],
        "peak_mb": by_label["peak_mb"].max(),
    }
    return {name: _by_label(column, checkpoints) for name, column in costs.items()}


def _by_label(column: pd.Series, checkpoints: list[str]) -> dict[str, float | None]:
    values = {label: float(column.get(label, math.nan)) for label in checkpoints}
    return {label: value if math.isfinite(value) else None for label, value in values.items()}  # JSON has no NaN


def mean_of_known(values: np.ndarray) -> float | None:
    """Mean of the values that are not NaN; None without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
