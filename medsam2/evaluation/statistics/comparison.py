"""Paired tests between checkpoints, corrected for their number: by structure, modality and size of the object.

`compare` gives what `summary.json` holds as "comparisons", one TEST for each pair of checkpoints, score and part:

    {"by": "all" | "modality" | "structure" | "size", "modality": NAME, "structure": NAME, "size": NAME,   or "all"
     "score": NAME, "from": LABEL, "to": LABEL,
     "patients": int, "objects": int, "leaks": int,   (cases that one of the two was trained on)
     "mean": float, "low": float | null, "high": float | null,   change over patients, 95 % (as in `summary`)
     "effect": float | null,                          mean / standard deviation over patients (Cohen's d_z)
     "better": float,                                 share of patients who gain; an equal score counts a half
     "p": float | null, "p_holm": float | null,       null where no test is possible
     "test": "exact" | "drawn" | "none",              all sign flips, DRAWS of them, or too few patients
     "verdict": "better" | "worse" | "no difference shown" | "no test: fewer than 6 patients"}

The test is the sign-flip (Fisher-Pitman) permutation test of the mean difference over patients (Pitman 1937; Good,
Permutation Tests, 2nd ed. 2000): if two checkpoints were as good as one another, each patient's difference could as
well have had the other sign. It asks about the mean, which is the number that is reported, whereas Wilcoxon's
signed-rank test, the usual choice (Demsar, JMLR 7, 2006), asks about a pseudo-median and drops equal scores, of which
segmentations have many (both empty). It is exact for few patients and assumes no normal distribution; drawn flips
count the observed one, so that p is never 0 (Phipson and Smyth, Stat. Appl. Genet. Mol. Biol. 9, 2010). With five
patients the smallest p of 2^5 flips is 0.0625, so below six nothing can be significant and no test is made.

p_holm is corrected by Holm's step-down rule (Scand. J. Stat. 6, 1979), which needs no independence. A family is
everything that is looked at together: all pairs and all parts of one "by", of one score.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from medsam2.evaluation.statistics.intervals import bootstrap_interval
from medsam2.evaluation.statistics.summary import DISTANCES, SIZES, TOTAL, mixed_units, size_classes

if TYPE_CHECKING:
    import pandas as pd

TESTED = ("dsc", "nsd", "hd95", "jf")
LOWER_IS_BETTER = frozenset(DISTANCES)
FEWEST = 6
ALPHA = 0.05
EXACT_UP_TO = 14  # patients: 16,384 flips
DRAWS = 19_999
RESAMPLES = 5000
KEYS = ("protocol", "corruption", "severity", "dataset", "case", "object")  # what makes two rows a pair


def compare(
    rows: pd.DataFrame, checkpoints: list[str], seed: int, scores: tuple[str, ...] = TESTED, resamples: int = RESAMPLES
) -> list[dict[str, Any]]:
    """Tests of every pair of checkpoints (see the module's docstring); none with one checkpoint.

    Args:
        rows: one a `quick.Row`. Only objects that both checkpoints of a pair were scored on count.
        checkpoints: labels in order; of a pair the earlier one is "from".
        seed: of the intervals and of drawn sign flips.
        scores: columns; one that nothing was computed for gives no test.
    """
    known = [name for name in scores if name in rows and rows[name].notna().any()]
    rows = rows.assign(size=size_classes(rows))
    tests: list[dict[str, Any]] = []
    for name in known:
        for _, family in itertools.groupby(_parts(rows), key=lambda found: found[0]["by"]):
            own = [
                {**where, **test}
                for where, part in family
                if not (name in DISTANCES and mixed_units(part))
                for pair in itertools.combinations(checkpoints, 2)
                if (test := _test(part, name, pair, seed, resamples)) is not None
            ]
            _correct(own)
            tests += own
    return tests


def _parts(rows: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    everything = {"by": TOTAL, "modality": TOTAL, "structure": TOTAL, "size": TOTAL}
    yield everything, rows
    for modality, part in rows.groupby("modality", sort=True):
        yield {**everything, "by": "modality", "modality": str(modality)}, part
    for (modality, structure), part in rows.groupby(["modality", "structure"], sort=True):
        yield {**everything, "by": "structure", "modality": str(modality), "structure": str(structure)}, part
    for size in SIZES:
        if (rows["size"] == size).any():
            yield {**everything, "by": "size", "size": size}, rows[rows["size"] == size]


def _test(part: pd.DataFrame, name: str, pair: tuple[str, str], seed: int, resamples: int) -> dict[str, Any] | None:
    """One TEST without its correction; None where the two have no object in common."""
    own = part[part["checkpoint"].isin(pair)]
    keys = [key for key in KEYS if key in own]
    wide = own.set_index([*keys, "patient", "checkpoint"])[name].unstack("checkpoint").reindex(columns=list(pair))
    change = (wide[pair[1]] - wide[pair[0]]).dropna()
    if change.empty:
        return None
    # Sorted, so that drawn flips do not depend on the order of the patients' salted names.
    values = np.sort(change.groupby(["dataset", "patient"]).mean().to_numpy(dtype=float))
    leaks = own[own["leak"]][["dataset", "case"]].drop_duplicates() if "leak" in own else ()
    gains = -np.sign(values) if name in LOWER_IS_BETTER else np.sign(values)
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    low, high = bootstrap_interval(values, seed, resamples) or (None, None)
    return {
        "score": name,
        "from": pair[0],
        "to": pair[1],
        "patients": len(values),
        "objects": len(change),
        "leaks": len(leaks),
        "mean": float(values.mean()),
        "low": low,
        "high": high,
        "effect": float(values.mean() / deviation) if deviation > 0 else None,
        "better": float((gains + 1).mean() / 2),
        "p": sign_flip(values, seed) if len(values) >= FEWEST else None,
        "test": "none" if len(values) < FEWEST else "exact" if len(values) <= EXACT_UP_TO else "drawn",
    }


def sign_flip(values: np.ndarray, seed: int) -> float:
    """Two-sided p of the mean of `values` (differences, one a patient) if each could as well have the other sign.

    Exact up to 14 patients, from 19,999 drawn flips and the observed one above.
    """
    count = len(values)
    seen = abs(values.sum()) - 1e-12 * abs(values).sum()  # an equal sum must not fall below it by rounding
    if count <= EXACT_UP_TO:
        flips = (np.arange(1 << count)[:, None] >> np.arange(count)) & 1
        return float((abs((1 - 2 * flips) @ values) >= seen).mean())
    generator = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, DRAWS, step := max(1, 4_000_000 // count)):
        flips = generator.integers(0, 2, (min(step, DRAWS - start), count), dtype=np.int8)
        extreme += int((abs(values.sum() - 2 * (flips @ values)) >= seen).sum())
    return (1 + extreme) / (1 + DRAWS)


def holm(values: list[float]) -> list[float]:
    """p values corrected for their number by Holm's step-down rule, in the order given."""
    order = np.argsort(values, kind="stable")
    steps = np.asarray(values)[order] * np.arange(len(values), 0, -1)
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(values) else steps
    return corrected.tolist()


def _correct(family: list[dict[str, Any]]) -> None:
    """Write p_holm and the verdict into the tests of one family."""
    tested = [test for test in family if test["p"] is not None]
    for test in family:
        test |= {"p_holm": None, "verdict": f"no test: fewer than {FEWEST} patients"}
    for test, corrected in zip(tested, holm([test["p"] for test in tested]), strict=True):
        gain = test["mean"] < 0 if test["score"] in LOWER_IS_BETTER else test["mean"] > 0
        test["p_holm"] = corrected
        test["verdict"] = "no difference shown" if corrected >= ALPHA else "better" if gain else "worse"


def p_text(value: float | None) -> str:
    """'0.012', '<0.001', or '-' where there was no test."""
    if value is None or math.isnan(value):
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"
