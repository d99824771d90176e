"""What a prepare has to do: which cases, in which split, and which of them stand in the shards already."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medsam2 import __version__
from medsam2.cases.layouts.registry import CaseRef, find_cases
from medsam2.cases.settings import RULES, WINDOWS, SettingsBook, Window
from medsam2.errors import UserError
from medsam2.shards.folder import Published
from medsam2.shards.identity import read_salt, salted, slug
from medsam2.shards.split import assign, read_split_file, thin
from medsam2.shards.stage import Job, Recipe, make_job, window_case

SHARD_BYTES = 256 << 20


@dataclass(frozen=True)
class PrepareOptions:
    """What a user may choose. `shares` of the splits, or a `split_file` that names them.

    Attributes:
        book: how the data sets are read, scaled and labelled.
        workers: processes at most. dask: address of a scheduler whose workers are used instead.
        staging: a folder for staged cases, by default inside of the output, or in the user's cache for a URL.
        shard_bytes: a shard is closed before it would grow beyond this (one case always fits).
    """

    recipe: Recipe = Recipe()
    book: SettingsBook = SettingsBook()
    shares: dict[str, float] = field(default_factory=lambda: {"train": 0.8, "val": 0.2})
    split_file: Path | None = None
    seed: int = 0
    layout: str | None = None
    modality: str | None = None
    workers: int = 1
    dask: str | None = None
    staging: Path | None = None
    strict: bool = False
    shard_bytes: int = SHARD_BYTES

    def configuration(self) -> dict[str, Any]:
        """What decides the bytes of the shards, as `index.json` states it; no path and no name of a case is in it."""
        split: Any = self.shares
        if self.split_file:
            try:
                split = "file sha256 " + hashlib.sha256(self.split_file.read_bytes()).hexdigest()
            except OSError as error:
                raise UserError(f"--split-file {self.split_file}: {error.strerror}.") from None
        return {
            **self.recipe.to_dict(),
            "settings": self.book.model_dump(mode="json", exclude_defaults=True),
            "split": split,
            "seed": self.seed,
            "layout": self.layout,
            "modality": self.modality,
            "shard_bytes": self.shard_bytes,
            "version": __version__,
        }


@dataclass(frozen=True)
class FoundDataset:
    """One line of what was found: a data set, its layouts and modalities, and how many cases."""

    name: str
    layout: str
    modality: str
    cases: int


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        jobs: cases to prepare now. kept: cases of the source that are published already.
        persons: salted patient id -> an id of the same patient in whatever data set.
        datasets: what was found. provenance: source, licence and layout by the data set's name in the index.
        left_out: cases in no list of the split file. notes: what the user should know, each with what it is about.
    """

    jobs: list[Job]
    kept: list[Job]
    persons: dict[str, str]
    datasets: list[FoundDataset]
    provenance: dict[str, dict[str, str]]
    left_out: int = 0
    notes: tuple[tuple[str, str], ...] = ()


def make_plan(source: Path | str, options: PrepareOptions, published: Published | None = None) -> Plan:
    """Find every case under `source` and decide what is to be done with it.

    Raises:
        UserError: nothing found, or a split or window that does not fit.
    """
    found = find_cases(Path(source), options.layout, options.modality, options.book)
    check_windows(found, options.book)
    salt = read_salt()
    removed = published.removed if published else set()
    refs = [ref for ref in found if not removed & {salted(salt, "patient", ref.dataset, ref.patient_id)}]
    known = _known_patients(refs, published, salt)
    fixed = _fixed(known, published)
    splits = split_of(refs, options, fixed)
    if not splits and refs:
        raise UserError(f"--split-file {options.split_file}: it names no case of {source}.")
    every = [make_job(ref, splits[_key(ref)], salt) for ref in refs if _key(ref) in splits]
    done = published.cases if published else {}
    notes = [] if options.split_file else [("split", text) for text in thin(refs, splits, options.shares)]
    if len(found) > len(refs):
        notes.append(("removed", f"{len(found) - len(refs)} cases of patients who were taken out are left out."))
    if published:
        notes += _vanished(refs, published, salt)
    persons = {job.patient: _person(salt, job.ref.patient_id) for job in every}
    return Plan(
        jobs=[job for job in every if job.case not in done],
        kept=[job for job in every if job.case in done],
        persons={**{patient: _person(salt, name) for patient, name in known.items()}, **persons},
        datasets=found_datasets(found),
        provenance={slug(ref.dataset): provenance(ref) for ref in found},
        left_out=len(refs) - len(every),
        notes=tuple(notes),
    )


def split_of(
    refs: Sequence[CaseRef], options: PrepareOptions, fixed: Mapping[str, str] | None = None
) -> dict[tuple[str, str], str]:
    """Split of each case by (dataset, case_id); patients in `fixed` keep theirs."""
    if not options.split_file:
        return assign(refs, options.shares, options.seed, fixed)
    wanted = read_split_file(options.split_file, refs)
    # a patient may have been moved to another split for a duplicate: what is published holds
    return {_key(r): (fixed or {}).get(r.patient_id, wanted[_key(r)]) for r in refs if _key(r) in wanted}


def check_windows(refs: Sequence[CaseRef], book: SettingsBook) -> None:
    """Refuse a window in HU where no case is CT.

    Raises:
        UserError: naming the window and what there is instead.
    """
    by_dataset: dict[str, list[CaseRef]] = defaultdict(list)
    for ref in refs:
        by_dataset[ref.dataset].append(ref)
    common = [w for w in book.common.wanted_windows if w is not None and w not in RULES]
    wanted: list[tuple[str, Sequence[CaseRef], list[str | Window]]] = [("--window", refs, common)]
    for name, members in by_dataset.items():
        own = [w for w in members[0].settings.wanted_windows if w in WINDOWS and w not in common]
        wanted.append((f"datasets.{name}: window", members, [w for w in own if w is not None]))
    for where, concerned, windows in wanted:
        if windows and not any(ref.modality in ("CT", "") for ref in concerned):
            found = ", ".join(sorted({ref.modality for ref in concerned}))
            raise UserError(f"{where} applies to CT, but there is {found} alone; leave it out, or give --modality CT.")


def found_datasets(refs: Sequence[CaseRef]) -> list[FoundDataset]:
    """One entry a data set, in the order of `refs`."""
    counts = Counter(ref.dataset for ref in refs)
    layouts: dict[str, set[str]] = {name: set() for name in counts}
    modalities: dict[str, set[str]] = {name: set() for name in counts}
    for ref in refs:
        layouts[ref.dataset].add(ref.layout)
        modalities[ref.dataset].add(ref.modality or "?")
    return [
        FoundDataset(name, ", ".join(sorted(layouts[name])), ", ".join(sorted(modalities[name])), count)
        for name, count in counts.items()
    ]


def _known_patients(refs: Sequence[CaseRef], published: Published | None, salt: bytes) -> dict[str, str]:
    """Salted id -> name, of published patients whom the source has in whatever data set."""
    if published is None:
        return {}
    there = {case.patient for case in published.cases.values()}
    names = sorted({ref.patient_id for ref in refs})
    ids = ((salted(salt, "patient", dataset, name), name) for dataset in published.datasets for name in names)
    return {patient: name for patient, name in ids if patient in there}


def _fixed(known: Mapping[str, str], published: Published | None) -> dict[str, str]:
    """Patient -> the split in which its published cases are.

    Raises:
        UserError: the published cases of a patient stand in two splits.
    """
    fixed: dict[str, str] = {}
    for case in published.cases.values() if published else ():
        name = known.get(case.patient)
        if name is not None and fixed.setdefault(name, case.split) != case.split:
            raise UserError(
                f"patient {name!r}: the shards have cases of theirs in {fixed[name]} and in {case.split}, so new ones "
                "belong to neither; prepare everything into a new folder."
            )
    return fixed


def _vanished(refs: Sequence[CaseRef], published: Published, salt: bytes) -> list[tuple[str, str]]:
    here = {
        window_case(salted(salt, "case", ref.dataset, ref.case_id), number)
        for ref in refs
        for number in range(len(ref.settings.wanted_windows))
    }
    gone = len(set(published.cases) - here)
    return [("source", f"{gone} prepared cases are not there any more; their shards stay.")] if gone else []


def provenance(ref: CaseRef) -> dict[str, str]:
    """Where a case's data set comes from and its licence, by the user's settings or else by itself; and its layout."""
    said, own = ref.settings, ref.origin
    return {"source": said.source or own.source, "licence": said.licence or own.licence, "layout": ref.layout}


def _person(salt: bytes, name: str) -> str:
    return salted(salt, "patient", "", name)


def _key(ref: CaseRef) -> tuple[str, str]:
    return ref.dataset, ref.case_id
