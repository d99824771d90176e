"""Which patient belongs to which split: a function of the seed and the patient's name, never of the salt."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from medsam2.errors import UserError, did_you_mean

NAMES = ("train", "val", "test")


class Named(Protocol):
    """What a split needs to know of a case (`CaseRef` has it)."""

    @property
    def dataset(self) -> str: ...
    @property
    def case_id(self) -> str: ...
    @property
    def patient_id(self) -> str: ...


def parse_shares(text: str) -> dict[str, float]:
    """`0.8,0.2` -> {"train": 0.8, "val": 0.2}; a third share is `test`.

    Raises:
        UserError: not one to three shares between 0 and 1 that add up to 1.
    """
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    good = 1 <= len(shares) <= len(NAMES) and all(0 <= s <= 1 for s in shares)
    if not good or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise UserError(f"--split {text!r}: expected shares of train,val[,test] that add up to 1, e.g. 0.8,0.2.")
    return dict(zip(NAMES, shares, strict=False))


def position(seed: int, patient: str) -> float:
    """A number in [0, 1) that depends on seed and patient alone, so that added cases never move others."""
    digest = hashlib.sha256(f"{seed}:{patient}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign(cases: Sequence[Named], shares: dict[str, float], seed: int) -> dict[tuple[str, str], str]:
    """Split of each case by (dataset, case_id): all cases of one patient, in whatever data set, share one.

    Patients fall into shares by `position`. Where that leaves a split of a data set without any patient although
    there are enough, the patient nearest to that split's share moves there, unless another data set has it too.
    """
    patients: dict[str, set[str]] = defaultdict(set)
    homes: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        patients[case.dataset].add(case.patient_id)
        homes[case.patient_id].add(case.dataset)
    chosen = {patient: _share_of(position(seed, patient), shares) for patient in homes}
    for dataset in sorted(patients):
        _fill_empty(chosen, {p for p in patients[dataset] if len(homes[p]) == 1}, patients[dataset], shares, seed)
    return {(case.dataset, case.case_id): chosen[case.patient_id] for case in cases}


def read_split_file(path: Path, cases: Sequence[Named]) -> dict[tuple[str, str], str]:
    """Split of each case named in a json file {"train": [...], "val": [...]} of patient or case names.

    Cases that no list names are left out.

    Raises:
        UserError: unreadable, a name that no case has, or a patient in two splits.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--split-file {path}: no such file.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--split-file {path}: not readable as json ({error}).") from None
    well_formed = isinstance(content, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in content.values()
    )
    if not well_formed or not content:
        raise UserError(f'--split-file {path}: expected {{"train": ["name", ...], "val": ["name", ...]}}.')
    known = {name for case in cases for name in (case.case_id, case.patient_id)}
    wanted: dict[str, str] = {}
    for split, names in content.items():
        if not split.isidentifier():
            raise UserError(f"--split-file {path}: split {split!r} must be a plain word such as train or val.")
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known)
                raise UserError(f"--split-file {path}: no case or patient is named {name!r}.{hint}")
            if wanted.setdefault(name, split) != split:
                raise UserError(f"--split-file {path}: {name!r} stands in {wanted[name]} and in {split}.")
    result: dict[tuple[str, str], str] = {}
    by_patient: dict[str, str] = {}
    for case in cases:
        found = wanted.get(case.case_id, wanted.get(case.patient_id))
        if found is None:
            continue
        if by_patient.setdefault(case.patient_id, found) != found:
            raise UserError(
                f"--split-file {path}: patient {case.patient_id!r} would be in {by_patient[case.patient_id]} and in "
                f"{found}; all cases of a patient belong to one split."
            )
        result[case.dataset, case.case_id] = found
    return result


def _share_of(at: float, shares: dict[str, float]) -> str:
    upper = 0.0
    for name, share in shares.items():
        upper += share
        if at < upper:
            return name
    return [name for name, share in shares.items() if share > 0][-1]


def _fill_empty(
    chosen: dict[str, str], movable: set[str], patients: set[str], shares: dict[str, float], seed: int
) -> None:
    wanted = [name for name, share in shares.items() if share > 0]
    if len(patients) < len(wanted):
        return
    for name in wanted:
        if any(chosen[p] == name for p in patients):
            continue
        lower = sum(share for other, share in shares.items() if NAMES.index(other) < NAMES.index(name))
        middle = lower + shares[name] / 2
        spare = [p for p in movable if sum(chosen[q] == chosen[p] for q in patients) > 1]
        if spare:
            chosen[min(spare, key=lambda p: (abs(position(seed, p) - middle), p))] = name
