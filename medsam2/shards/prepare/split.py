"""Assign patients to splits, from the seed and the patient's name; the salt has no influence.

Patients who share voxels are moved into one split after the cases are read (`join_duplicates`).
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from medsam2.cases.case import CaseRef
from medsam2.errors import UserError, did_you_mean

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class HashedCase:
    """A prepared case. `content_hash` is the hash of its voxels; empty if unknown."""

    dataset: str
    case_id: str
    patient_id: str
    content_hash: str
    split: str


def parse_shares(text: str) -> dict[str, float]:
    """`0.8,0.2` -> {"train": 0.8, "val": 0.2}; a third share is `test`.

    Raises:
        UserError: the text is not one to three shares between 0 and 1 that add up to 1.
    """
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    valid = 1 <= len(shares) <= len(SPLITS) and all(0 <= s <= 1 for s in shares)
    if not valid or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise UserError(f"--split {text!r}: expected shares of train,val[,test] that add up to 1, e.g. 0.8,0.2.")
    return dict(zip(SPLITS, shares, strict=False))


def unit_hash(seed: int, patient: str) -> float:
    """Hash seed and patient to a number in [0, 1). It depends on nothing else, so that added cases move no others."""
    digest = hashlib.sha256(f"{seed}:{patient}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign_splits(cases: Sequence[CaseRef], shares: dict[str, float], seed: int) -> dict[tuple[str, str], str]:
    """Assign a split to each case, by (dataset, case_id); all cases of a patient, in all datasets, share one split.

    A split that the dataset prescribes is used; the other patients are distributed by `unit_hash`. If a split of a
    dataset stays empty although there are enough patients, the patient nearest to that split's share moves there,
    unless the patient is in another dataset too or has a prescribed split.

    Raises:
        UserError: a patient has two prescribed splits.
    """
    patients: dict[str, set[str]] = defaultdict(set)
    homes: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        patients[case.dataset].add(case.patient_id)
        homes[case.patient_id].add(case.dataset)
    prescribed = _prescribed_splits(cases)
    splits = {patient: prescribed.get(patient) or _split_at(unit_hash(seed, patient), shares) for patient in homes}
    for dataset in sorted(patients):
        movable = {p for p in patients[dataset] if len(homes[p]) == 1 and p not in prescribed}
        _fill_empty_splits(splits, movable, patients[dataset], shares, seed)
    return {(case.dataset, case.case_id): splits[case.patient_id] for case in cases}


def join_duplicates(cases: Sequence[HashedCase]) -> dict[HashedCase, HashedCase]:
    """Move patients who share voxels, directly or through others, into the split of the first of their cases.

    The first case is that with the lowest (dataset, case_id); the order of `cases` does not matter. A case without a
    content hash shares voxels with no other.

    Returns:
        Each case that changes its split, with the case whose split it gets.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ordered = sorted(cases, key=lambda c: (c.dataset, c.case_id, c.content_hash, c.patient_id, c.split))
    # In a graph of patients and contents every case is an edge; connected components belong together.
    numbers: dict[tuple[str, str], int] = {}
    rows = [numbers.setdefault(("patient", case.patient_id), len(numbers)) for case in ordered]
    columns = [numbers.setdefault(("content", case.content_hash or repr(case)), len(numbers)) for case in ordered]
    graph = coo_array(([1] * len(ordered), (rows, columns)), shape=(len(numbers), len(numbers)))
    labels = connected_components(graph, directed=False)[1][rows].tolist()
    first: dict[int, HashedCase] = {}
    leaders = [first.setdefault(label, case) for label, case in zip(labels, ordered, strict=True)]
    return {case: leader for case, leader in zip(ordered, leaders, strict=True) if case.split != leader.split}


def describe_empty_splits(
    cases: Sequence[CaseRef], splits: Mapping[tuple[str, str], str], shares: Mapping[str, float]
) -> list[str]:
    """Return one warning per dataset in which a split with a share above 0 has no patient."""
    patients: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for case in cases:
        patients[case.dataset][splits[case.dataset, case.case_id]].add(case.patient_id)
    warnings = []
    for dataset, by_split in sorted(patients.items()):
        empty = [name for name, share in shares.items() if share > 0 and name not in by_split]
        if empty:
            count = len(set().union(*by_split.values()))
            sizes = ", ".join(f"{name} {len(members)}" for name, members in sorted(by_split.items()))
            warnings.append(
                f"{dataset}: no patient in {' and '.join(empty)} ({count} patient{'s' if count > 1 else ''}: {sizes}); "
                "add patients, choose them with --split-file, or ask for fewer splits with --split."
            )
    return warnings


def read_split_file(path: Path, cases: Sequence[CaseRef]) -> dict[tuple[str, str], str]:
    """Read the split of each case from a json file {"train": [...], "val": [...]} of patient or case names.

    Cases that no list names are left out.

    Raises:
        UserError: the file cannot be read, names an unknown case, or puts a patient in two splits.
    """
    try:
        content = TypeAdapter(dict[str, list[str]]).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"--split-file {path}: {error.strerror}.") from None
    except ValueError:
        raise UserError(f'--split-file {path}: expected json: {{"train": ["name", ...], "val": [...]}}.') from None
    known = {name for case in cases for name in (case.case_id, case.patient_id)}
    split_of_name: dict[str, str] = {}
    for split, names in content.items():
        if not split.isidentifier():
            raise UserError(f"--split-file {path}: split {split!r} must be a plain word such as train or val.")
        for name in names:
            if name not in known:
                hint = did_you_mean(name, known)
                raise UserError(f"--split-file {path}: no case or patient is named {name!r}.{hint}")
            if split_of_name.setdefault(name, split) != split:
                raise UserError(f"--split-file {path}: {name!r} is in {split_of_name[name]} and in {split}.")
    splits = [split_of_name.get(case.case_id, split_of_name.get(case.patient_id, "")) for case in cases]
    named = [replace(case, split=split) for case, split in zip(cases, splits, strict=True) if split]
    try:
        _prescribed_splits(named)
    except UserError as error:
        raise UserError(f"--split-file {path}: {error}") from None
    return {(case.dataset, case.case_id): case.split for case in named}


def _prescribed_splits(cases: Iterable[CaseRef]) -> dict[str, str]:
    """Map each patient to the split that the dataset (or the user's file) prescribes.

    Raises:
        UserError: a split is not a plain word, or a patient has two.
    """
    first: dict[str, CaseRef] = {}
    for case in cases:
        if not case.split:
            continue
        where = f"{case.dataset}/{case.case_id}"
        if not case.split.isidentifier():
            raise UserError(f"{where}: split {case.split!r} must be a plain word such as train or val.")
        other = first.setdefault(case.patient_id, case)
        if other.split != case.split:
            raise UserError(
                f"patient {case.patient_id!r} is prescribed to {other.split} by {other.dataset}/{other.case_id} and to "
                f"{case.split} by {where}; all cases of a patient belong to one split. If these are two people, give "
                "them different names."
            )
    return {patient: case.split for patient, case in first.items()}


def _split_at(position: float, shares: dict[str, float]) -> str:
    upper = 0.0
    for name, share in shares.items():
        upper += share
        if position < upper:
            return name
    return [name for name, share in shares.items() if share > 0][-1]


def _fill_empty_splits(
    splits: dict[str, str], movable: set[str], patients: set[str], shares: dict[str, float], seed: int
) -> None:
    nonempty = [name for name, share in shares.items() if share > 0]
    if len(patients) < len(nonempty):
        return
    for name in nonempty:
        if any(splits[p] == name for p in patients):
            continue
        lower = sum(share for other, share in shares.items() if SPLITS.index(other) < SPLITS.index(name))
        middle = lower + shares[name] / 2
        candidates = [p for p in movable if sum(splits[q] == splits[p] for q in patients) > 1]
        if candidates:
            splits[min(candidates, key=lambda p: (abs(unit_hash(seed, p) - middle), p))] = name
