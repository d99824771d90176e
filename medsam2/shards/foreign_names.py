"""Who is who in the index of foreign tars: cases, patients and splits of all samples together, salted at the end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from medsam2.cases.settings import SettingsBook
from medsam2.shards.foreign_sample import Found, Names
from medsam2.shards.identity import read_salt, salted
from medsam2.shards.split import Hashed, assign, join_duplicates, read_split_file, thin

Place = tuple[str, str]  # of a sample: tar and key


class SplitOptions(Protocol):
    """What decides names and splits."""

    @property
    def book(self) -> SettingsBook: ...
    @property
    def shares(self) -> dict[str, float]: ...
    @property
    def split_file(self) -> Path | None: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Named:
    """Complete rows, shards named as the tars are.

    Attributes:
        samples: how many the rows come from. skipped: (tar, key, reason).
        foreign: data sets of foreign samples as the index names them, each with its own name.
    """

    rows: tuple[dict[str, Any], ...]
    samples: int
    skipped: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]
    foreign: dict[str, str]


@dataclass(frozen=True)
class _Case:
    """A foreign sample as `split` wants it.

    `patient_id` is the patient in whatever data set, `patient` what is salted: without a stated patient the two differ,
    since the same number in two data sets is hardly one person.
    """

    dataset: str
    case_id: str
    patient_id: str
    split: str
    patient: str


def name_rows(found: Sequence[tuple[str, Found]], options: SplitOptions, before: Mapping[str, Any]) -> Named:
    """Rows in the order of `found` ((tar, row) pairs).

    Args:
        before: an earlier `index.json`; patients who were taken out stay out.

    Raises:
        UserError: a patient in two stated splits, or a split file that does not fit.
    """
    cases = _cases(found, options)
    splits, notes = _splits(cases, found, options)
    salt = read_salt() if cases else b""
    removed = set(before.get("removed_patients", ()))
    repeated = Counter((f.row["dataset"], f.row["key"]) for _, f in found if f.names is not None)
    rows: list[dict[str, Any]] = []
    skipped: dict[tuple[str, str, str], None] = {}
    own: dict[tuple[str, str], str] = {}
    for tar, entry in found:
        row = {**entry.row, "shard": tar}
        reason = ""
        if entry.names is None:
            first = own.setdefault((row["dataset"], row["key"]), tar)
            reason = f"the same segment stands in {first} already" if first != tar else ""
        else:
            case = cases[tar, entry.sample]
            row["split"] = splits.get((case.dataset, case.case_id), "")
            row["case"] = salted(salt, "case", case.dataset, case.case_id)
            row["patient"] = salted(salt, "patient", case.dataset, case.patient)
            if repeated[row["dataset"], row["key"]] > 1:
                row["key"] = f"{_stem(tar)}/{row['key']}"
            reason = "" if row["split"] else "it is in no list of the split file"
        if row["patient"] in removed:
            reason = "its patient was taken out of these shards"
        if reason:
            skipped[tar, entry.sample, reason] = None
        else:
            rows.append({**row, "sample": entry.sample})
    samples = len({(row["shard"], row.pop("sample")) for row in rows})
    foreign = {f.row["dataset"]: f.names.dataset for _, f in found if f.names is not None}
    return Named(tuple(rows), samples, tuple(skipped), tuple(notes), foreign)


def _cases(found: Sequence[tuple[str, Found]], options: SplitOptions) -> dict[Place, _Case]:
    """Foreign samples by place. A name that several samples of a data set bear gets tar and key beside it."""
    names = {(tar, f.sample): (f.row["dataset"], f.names) for tar, f in found if f.names is not None}
    bearers = Counter((dataset, said.case or key) for (_, key), (dataset, said) in names.items())
    cases: dict[Place, _Case] = {}
    for (tar, key), (dataset, said) in names.items():
        case = name = said.case or key
        if bearers[dataset, name] > 1:
            case = f"{said.case}/{_stem(tar)}/{key}" if said.case else f"{_stem(tar)}/{key}"
        stated = said.patient or _patient(name, said, options.book)
        patient = stated or said.case or case
        cases[tar, key] = _Case(dataset, case, stated or f"{dataset}/{patient}", said.split, patient)
    return cases


def _patient(name: str, said: Names, book: SettingsBook) -> str:
    """Who the `patient` pattern of the settings finds in a case's name."""
    pattern = book.of(said.dataset).patient
    match = re.search(pattern, name) if pattern else None
    return match["patient"] or "" if match else ""


def _splits(
    cases: Mapping[Place, _Case], found: Sequence[tuple[str, Found]], options: SplitOptions
) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Split of every case by (dataset, case_id); cases with the same pixels share one unless both were stated."""
    every = list(cases.values())
    if not every:
        return {}, []
    if options.split_file:
        return read_split_file(options.split_file, every), []
    chosen = assign(every, options.shares, options.seed)
    hashes = {cases[tar, f.sample]: f.row["content_hash"] for tar, f in found if f.names is not None}
    hashed = [
        Hashed(c.dataset, c.case_id, c.patient_id, digest, chosen[c.dataset, c.case_id], settled=bool(c.split))
        for c, digest in hashes.items()
    ]
    joined = join_duplicates(hashed)
    notes = [
        f"{move.dataset}: {len(move.case_ids)} samples moved from {move.before} to {move.after}: they share their "
        "pixels with samples there."
        for move in joined.moves
    ]
    notes += [f"the same pixels stand in different splits, of {len(group)} patients." for group in joined.conflicts]
    drawn = {case.dataset for case in every if not case.split}
    shared = [case for case in every if case.dataset in drawn]
    return dict(joined.splits), notes + thin(shared, joined.splits, options.shares)


def _stem(tar: str) -> str:
    return tar.removesuffix(".tar")
