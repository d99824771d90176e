"""Which patient belongs to which split: a function of the seed and the patient's name, never of the salt.

What is settled stays: added cases never move a patient whose cases stand in shards already. Patients who share voxels
are brought into one split once the cases are read (`join_duplicates`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    @property
    def split(self) -> str:
        """The split that the data set itself prescribes, or ""."""


@dataclass(frozen=True)
class Hashed:
    """A prepared case. `patient_id` is the patient in whatever data set; `settled`: published before in `split`."""

    dataset: str
    case_id: str
    patient_id: str
    content_hash: str
    split: str
    settled: bool


@dataclass(frozen=True)
class Move:
    """A patient who changes split because of a duplicate, once for each data set with cases of this patient.

    `like` is the (dataset, case_id) of a case with the same voxels as one of the patient's.
    """

    patient_id: str
    dataset: str
    case_ids: tuple[str, ...]
    before: str
    after: str
    like: tuple[str, str]


@dataclass(frozen=True)
class Joined:
    """What `join_duplicates` decides.

    Attributes:
        splits: of every case by (dataset, case_id).
        moves: sorted by patient and data set.
        conflicts: groups of patients whose voxels are linked although they are settled in different splits; they stay
            where they are, and whoever asked has to say so.
    """

    splits: dict[tuple[str, str], str]
    moves: list[Move]
    conflicts: list[tuple[str, ...]]


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


def assign(
    cases: Sequence[Named], shares: dict[str, float], seed: int, fixed: Mapping[str, str] | None = None
) -> dict[tuple[str, str], str]:
    """Split of each case by (dataset, case_id): all cases of one patient, in whatever data set, share one.

    Settled patients stay, prescribed ones go where their data set says, and the others fall into shares by `position`.
    Where that leaves a split of a data set without any patient although there are enough, the patient nearest to that
    split's share moves there, unless another data set has it too, or the patient is settled or prescribed.

    Args:
        fixed: patient -> the split settled earlier, which is never changed.

    Raises:
        UserError: a patient has two prescribed splits, or one that contradicts the settled one.
    """
    fixed = fixed or {}
    patients: dict[str, set[str]] = defaultdict(set)
    homes: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        patients[case.dataset].add(case.patient_id)
        homes[case.patient_id].add(case.dataset)
    bound = {**_prescribed(cases, fixed), **{patient: fixed[patient] for patient in homes if patient in fixed}}
    chosen = {patient: bound.get(patient) or _share_of(position(seed, patient), shares) for patient in homes}
    for dataset in sorted(patients):
        movable = {p for p in patients[dataset] if len(homes[p]) == 1 and p not in bound}
        _fill_empty(chosen, movable, patients[dataset], shares, seed)
    return {(case.dataset, case.case_id): chosen[case.patient_id] for case in cases}


def join_duplicates(cases: Sequence[Hashed]) -> Joined:
    """Bring patients who share voxels, directly or through others, into one split; the earlier assignment wins.

    That is the split of the settled cases, else of the first case by (dataset, case_id): the order of `cases` does not
    matter. Settled cases never move. A case without a content hash joins nobody.
    """
    ordered = sorted(cases, key=lambda c: (c.dataset, c.case_id, c.content_hash, c.patient_id, c.split, c.settled))
    splits: dict[tuple[str, str], str] = {}
    moves: list[Move] = []
    conflicts: list[tuple[str, ...]] = []
    for group in _linked(ordered):
        settled = [case for case in group if case.settled]
        winner = (settled or group)[0]
        if len({case.split for case in settled}) > 1:
            conflicts.append(tuple(sorted({case.patient_id for case in settled})))
        splits |= {(c.dataset, c.case_id): winner.split for c in group}
        splits |= {(c.dataset, c.case_id): c.split for c in settled}
        moves += _moves([c for c in group if not c.settled and c.split != winner.split], group, winner)
    return Joined(splits, sorted(moves, key=lambda m: (m.patient_id, m.dataset, m.before)), sorted(conflicts))


def thin(cases: Sequence[Named], splits: Mapping[tuple[str, str], str], shares: Mapping[str, float]) -> list[str]:
    """One warning for each data set where a split that has a share got no patient, with numbers and remedy."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for case in cases:
        split = splits.get((case.dataset, case.case_id))
        if split is not None:
            found[case.dataset][split].add(case.patient_id)
    wanted = [name for name, share in shares.items() if share > 0]
    warnings = []
    for dataset, by_split in sorted(found.items()):
        empty = [name for name in wanted if not by_split.get(name)]
        if empty:
            count = len(set().union(*by_split.values()))
            has = ", ".join(f"{name} {len(patients)}" for name, patients in sorted(by_split.items()))
            warnings.append(
                f"{dataset}: no patient in {' and '.join(empty)} ({count} patient{'s' if count > 1 else ''}: {has}); "
                "add patients, choose them with --split-file, or ask for fewer splits with --split."
            )
    return warnings


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


def _prescribed(cases: Iterable[Named], fixed: Mapping[str, str]) -> dict[str, str]:
    """Patient -> the split that its data set prescribes.

    Raises:
        UserError: not a plain word, two for one patient, or one that contradicts `fixed`.
    """
    found: dict[str, Named] = {}
    for case in cases:
        if not case.split:
            continue
        where = f"{case.dataset}/{case.case_id}"
        if not case.split.isidentifier():
            raise UserError(f"{where}: split {case.split!r} must be a plain word such as train or val.")
        first = found.setdefault(case.patient_id, case)
        if first.split != case.split:
            raise UserError(
                f"patient {case.patient_id!r} is prescribed to {first.split} by {first.dataset}/{first.case_id} and to "
                f"{case.split} by {where}; all cases of a patient belong to one split. If these are two people, give "
                "them different names."
            )
        settled = fixed.get(case.patient_id, case.split)
        if settled != case.split:
            raise UserError(
                f"patient {case.patient_id!r} is prescribed to {case.split} by {where}, but the shards already have "
                f"this patient in {settled}; write {settled} there, or prepare into a new folder."
            )
    return {patient: case.split for patient, case in found.items()}


def _linked(ordered: Sequence[Hashed]) -> list[list[Hashed]]:
    """The cases in groups that share patients or content hashes, in the order of their first case."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    patients = {patient: n for n, patient in enumerate(dict.fromkeys(case.patient_id for case in ordered))}
    contents = dict.fromkeys(case.content_hash for case in ordered if case.content_hash)
    hashes = {content: len(patients) + n for n, content in enumerate(contents)}
    edges = [(patients[c.patient_id], hashes[c.content_hash]) for c in ordered if c.content_hash]
    size = len(patients) + len(hashes)
    rows, columns = zip(*edges, strict=True) if edges else ((), ())
    _, label = connected_components(coo_array(([1] * len(edges), (rows, columns)), shape=(size, size)), directed=False)
    groups: dict[int, list[Hashed]] = defaultdict(list)
    for case in ordered:
        groups[int(label[patients[case.patient_id]])].append(case)
    return list(groups.values())


def _moves(moved: Sequence[Hashed], group: Sequence[Hashed], winner: Hashed) -> list[Move]:
    """One move for each patient, data set and earlier split among the `moved` cases of a group."""
    twins: dict[str, list[Hashed]] = defaultdict(list)
    contents: dict[str, set[str]] = defaultdict(set)
    for case in group:
        twins[case.content_hash].append(case)
        contents[case.patient_id].add(case.content_hash)
    by_home: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for case in moved:
        by_home[case.patient_id, case.dataset, case.split].append(case.case_id)
    moves = []
    for (patient, dataset, before), names in by_home.items():
        same = [c for content in contents[patient] if content for c in twins[content] if c.patient_id != patient]
        # a patient who was given in two splits has no twin: the case that decides stands in for it
        like = min(((c.dataset, c.case_id) for c in same), default=(winner.dataset, winner.case_id))
        moves.append(Move(patient, dataset, tuple(dict.fromkeys(names)), before, winner.split, like))
    return moves


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
