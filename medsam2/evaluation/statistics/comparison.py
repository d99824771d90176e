"""Paired tests between checkpoints, by structure, modality and size of the object, with Holm's correction.

`compare` returns "comparisons" of `summary.json`, one TEST for each pair of checkpoints, score and part:

    {"by": "all" | "modality" | "structure" | "size", "modality": NAME, "structure": NAME, "size": NAME,   or "all"
     "score": NAME, "from": LABEL, "to": LABEL,
     "patients": int, "objects": int, "leaks": int,   (cases that one of the two was trained on)
     "mean": float, "low": float | null, "high": float | null,   change over patients, 95 % (as in `summary`)
     "effect": float | null,                          mean / standard deviation over patients (Cohen's d_z)
     "better": float,                                 share of patients who improve; equal scores count a half
     "p": float | null, "p_holm": float | null,       null if no test is possible
     "test": "exact" | "drawn" | "none",              all sign flips, RANDOM_FLIPS of them, or too few patients
     "verdict": "better" | "worse" | "no difference shown" | "no test: fewer than 6 patients"}

The test is the sign-flip (Fisher-Pitman) permutation test of the mean difference over patients (Pitman 1937; Good,
Permutation Tests, 2nd ed. 2000): if two checkpoints were equally good, each patient's difference could as well have had
the other sign. It tests the mean, which is the number that we report. Wilcoxon's signed-rank test, the usual choice
(Demsar, JMLR 7, 2006), tests a pseudo-median and drops equal scores, which are frequent in segmentation (both masks
empty). The sign-flip test is exact for few patients and assumes no normal distribution. Random flips include the
observed one, so p is never 0 (Phipson and Smyth, Stat. Appl. Genet. Mol. Biol. 9, 2010). With five patients the
smallest p of 2^5 flips is 0.0625, so with fewer than six no result can be significant and no test is made.

p_holm is corrected by Holm's step-down rule (Scand. J. Stat. 6, 1979), which needs no independence. A family is all
pairs of checkpoints and all parts of one "by", for one score.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from medsam2.evaluation.statistics.intervals import mean_with_interval
from medsam2.evaluation.statistics.summary import DISTANCES, SIZES, TOTAL, mixed_units, size_classes

if TYPE_CHECKING:
    import pandas as pd

TESTED_SCORES = ("dsc", "nsd", "hd95", "jf")
MIN_PATIENTS = 6
ALPHA = 0.05
MAX_EXACT_PATIENTS = 14  # 16,384 flips
RANDOM_FLIPS = 19_999
RESAMPLES = 5000
PAIR_KEYS = ("protocol", "corruption", "severity", "dataset", "case", "object")  # equal in paired rows


def compare(rows: pd.DataFrame, checkpoints: list[str], seed: int) -> list[dict[str, Any]]:
    """Test every pair of checkpoints (see the module's docstring); an empty list with one checkpoint.

    Args:
        rows: one per `score_case.Row`. A pair compares the objects for which both checkpoints have a score.
        checkpoints: labels in order; of a pair the earlier one is "from".
        seed: of the intervals and of random sign flips.
    """
    computed = [name for name in TESTED_SCORES if name in rows and rows[name].notna().any()]
    rows = rows.assign(size=size_classes(rows))
    tests: list[dict[str, Any]] = []
    for name in computed:
        for _, parts in itertools.groupby(_iter_parts(rows), key=lambda part: part[0]["by"]):
            family = [
                {**keys, **test}
                for keys, part in parts
                if not (name in DISTANCES and mixed_units(part))
                for pair in itertools.combinations(checkpoints, 2)
                if (test := _test(part, name, pair, seed)) is not None
            ]
            _correct(family)
            tests += family
    return tests


def _iter_parts(rows: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    everything = {"by": TOTAL, "modality": TOTAL, "structure": TOTAL, "size": TOTAL}
    yield everything, rows
    for modality, part in rows.groupby("modality", sort=True):
        yield {**everything, "by": "modality", "modality": str(modality)}, part
    for (modality, structure), part in rows.groupby(["modality", "structure"], sort=True):
        yield {**everything, "by": "structure", "modality": str(modality), "structure": str(structure)}, part
    for size in SIZES:
        if (rows["size"] == size).any():
            yield {**everything, "by": "size", "size": size}, rows[rows["size"] == size]


def _test(part: pd.DataFrame, name: str, pair: tuple[str, str], seed: int) -> dict[str, Any] | None:
    """One TEST without its correction; None if the two checkpoints have no object in common."""
    rows = part[part["checkpoint"].isin(pair)]
    keys = [key for key in PAIR_KEYS if key in rows]
    wide = rows.set_index([*keys, "patient", "checkpoint"])[name].unstack("checkpoint").reindex(columns=list(pair))
    change = (wide[pair[1]] - wide[pair[0]]).dropna()
    if change.empty:
        return None
    # Sorted, so that random flips do not depend on the order of the patients' salted names.
    values = np.sort(change.groupby(["dataset", "patient"]).mean().to_numpy(dtype=float))
    leaks = rows[rows["leak"]][["dataset", "case"]].drop_duplicates() if "leak" in rows else ()
    gains = -np.sign(values) if name in DISTANCES else np.sign(values)
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return {
        "score": name,
        "from": pair[0],
        "to": pair[1],
        "patients": len(values),
        "objects": len(change),
        "leaks": len(leaks),
        **mean_with_interval(values, seed, RESAMPLES),
        "effect": float(values.mean() / deviation) if deviation > 0 else None,
        "better": float((gains + 1).mean() / 2),
        "p": sign_flip(values, seed) if len(values) >= MIN_PATIENTS else None,
        "test": "none" if len(values) < MIN_PATIENTS else "exact" if len(values) <= MAX_EXACT_PATIENTS else "drawn",
    }


def sign_flip(values: np.ndarray, seed: int) -> float:
    """Two-sided p of the mean of `values` (one difference per patient) by the sign-flip permutation test.

    Exact up to 14 patients; above, from 19,999 random flips and the observed one.
    """
    count = len(values)
    observed = abs(values.sum()) - 1e-12 * abs(values).sum()  # so that rounding does not put equal sums below it
    if count <= MAX_EXACT_PATIENTS:
        flips = (np.arange(1 << count)[:, None] >> np.arange(count)) & 1
        return float((abs((1 - 2 * flips) @ values) >= observed).mean())
    generator = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, RANDOM_FLIPS, step := max(1, 4_000_000 // count)):
        flips = generator.integers(0, 2, (min(step, RANDOM_FLIPS - start), count), dtype=np.int8)
        extreme += int((abs(values.sum() - 2 * (flips @ values)) >= observed).sum())
    return (1 + extreme) / (1 + RANDOM_FLIPS)


def holm(values: list[float]) -> list[float]:
    """Correct p values by Holm's step-down rule; keeps their order."""
    order = np.argsort(values, kind="stable")
    steps = np.asarray(values)[order] * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(values) else steps
    return corrected.tolist()


def _correct(family: list[dict[str, Any]]) -> None:
    """Write p_holm and the verdict into the tests of one family."""
    tested = [test for test in family if test["p"] is not None]
    for test in family:
        test |= {"p_holm": None, "verdict": f"no test: fewer than {MIN_PATIENTS} patients"}
    for test, corrected in zip(tested, holm([test["p"] for test in tested]), strict=True):
        gain = test["mean"] < 0 if test["score"] in DISTANCES else test["mean"] > 0
        test["p_holm"] = corrected
        test["verdict"] = "no difference shown" if corrected >= ALPHA else "better" if gain else "worse"


def format_p(value: float | None) -> str:
    """Format a p value: '0.012', '<0.001', or '-' without a test."""
    if value is None or math.isnan(value):
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"
