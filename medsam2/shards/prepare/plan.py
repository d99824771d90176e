"""Plan a prepare: which cases to stage, and in which split."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medsam2 import __version__
from medsam2.cases.case import CaseRef
from medsam2.cases.layouts import find_cases
from medsam2.cases.settings import WINDOW_PRESETS, WINDOW_RULES, SettingsBook
from medsam2.errors import UserError, did_you_mean
from medsam2.shards.prepare.pseudonyms import read_salt, slug
from medsam2.shards.prepare.split import assign_splits, describe_empty_splits, read_split_file
from medsam2.shards.prepare.stage import Job, Recipe, make_job

SHARD_BYTES = 256 << 20


@dataclass(frozen=True)
class PrepareOptions:
    """Options of the command. `split_file`, where given, replaces `shares` and `seed`.

    Attributes:
        book: how the datasets are read, scaled and labelled.
        shares: share of patients per split.
        exclude_patients: a file of patients to leave out, one name per line.
        workers: maximum number of processes. dask: address of a scheduler whose workers are used instead.
        staging: a folder for staged cases; by default inside the output, or in the user's cache for a URL.
        shard_bytes: maximum size of a shard, unless a single case is larger.
    """

    recipe: Recipe = Recipe()
    book: SettingsBook = SettingsBook()
    shares: dict[str, float] = field(default_factory=lambda: {"train": 0.8, "val": 0.2})
    split_file: Path | None = None
    seed: int = 0
    exclude_patients: Path | None = None
    layout: str | None = None
    modality: str | None = None
    workers: int = 1
    dask: str | None = None
    staging: Path | None = None
    strict: bool = False
    shard_bytes: int = SHARD_BYTES

    def configuration(self) -> dict[str, Any]:
        """Everything that determines the shards' bytes, for `index.json`; it holds no path and no case name."""
        split: Any = self.shares
        if self.split_file:
            try:
                split = "file sha256 " + hashlib.sha256(self.split_file.read_bytes()).hexdigest()
            except OSError as error:
                raise UserError(f"--split-file {self.split_file}: {error.strerror}.") from None
        return {
            **asdict(self.recipe),
            "settings": self.book.model_dump(mode="json", exclude_defaults=True),
            "split": split,
            "seed": self.seed,
            "layout": self.layout,
            "modality": self.modality,
            "shard_bytes": self.shard_bytes,
            "version": __version__,
        }


@dataclass(frozen=True)
class Plan:
    """The cases to prepare.

    Attributes:
        jobs: one per case. datasets: one line of text per dataset and modality.
        provenance: source, licence and layout by dataset slug.
        num_left_out: number of cases that the split file does not list. notes: (topic, text) for the user.
    """

    jobs: list[Job]
    datasets: list[str]
    provenance: dict[str, dict[str, str]]
    num_left_out: int
    notes: tuple[tuple[str, str], ...]


def make_plan(source: Path | str, options: PrepareOptions) -> Plan:
    """Find every case under `source` and assign its split.

    Raises:
        UserError: there is no case, or a split, window or list of patients does not fit.
    """
    refs = find_cases(Path(source), options.layout, options.modality, options.book)
    check_windows(refs, options.book)
    notes: list[tuple[str, str]] = []
    if options.exclude_patients:
        num_cases, refs = len(refs), exclude_patients(refs, options.exclude_patients)
        notes.append(("excluded", f"{num_cases - len(refs)} cases of --exclude-patients are left out."))
    if options.split_file:
        splits = read_split_file(options.split_file, refs)
    else:
        splits = assign_splits(refs, options.shares, options.seed)
        notes += [("split", text) for text in describe_empty_splits(refs, splits, options.shares)]
    if not splits:
        raise UserError(f"--split-file {options.split_file}: it names no case of {source}.")
    salt = read_salt()
    kinds = Counter((ref.dataset, ref.layout, ref.modality or "?") for ref in refs)
    jobs = [make_job(ref, splits[_case_key(ref)], salt) for ref in refs if _case_key(ref) in splits]
    return Plan(
        jobs=jobs,
        datasets=[f"{', '.join(kind)}: {n} cases" for kind, n in kinds.items()],
        provenance={slug(ref.dataset): provenance(ref) for ref in refs},
        num_left_out=len(refs) - len(jobs),
        notes=tuple(notes),
    )


def exclude_patients(refs: Sequence[CaseRef], path: Path) -> list[CaseRef]:
    """Return the cases of all patients except those that the file names.

    Raises:
        UserError: the file cannot be read, names an unknown patient, or names all patients.
    """
    try:
        names = {line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()}
    except (OSError, ValueError) as error:
        raise UserError(f"--exclude-patients {path}: not readable ({error}); give a text file of names.") from None
    patients = {ref.patient_id for ref in refs}
    for name in sorted(names - patients):
        raise UserError(f"--exclude-patients {path}: no patient is named {name!r}.{did_you_mean(name, patients)}")
    rest = [ref for ref in refs if ref.patient_id not in names]
    if not rest:
        raise UserError(f"--exclude-patients {path}: names all {len(patients)} patients; leave at least one.")
    return rest


def check_windows(refs: Sequence[CaseRef], book: SettingsBook) -> None:
    """Check that windows in HU apply to CT.

    Raises:
        UserError: no case is CT; the message names the modalities.
    """
    common = {window for window in book.common.clip_windows if window is not None and window not in WINDOW_RULES}
    by_flag: dict[str, set[str]] = defaultdict(set)
    for ref in refs:
        if common:
            by_flag["--window"].add(ref.modality)
        if any(window in WINDOW_PRESETS and window not in common for window in ref.settings.clip_windows):
            by_flag[f"datasets.{ref.dataset}: window"].add(ref.modality)
    for flag, modalities in by_flag.items():
        if not modalities & {"CT", ""}:
            names = ", ".join(sorted(modalities))
            raise UserError(f"{flag} applies to CT, but the data are {names}; leave it out, or give --modality CT.")


def provenance(ref: CaseRef) -> dict[str, str]:
    """Source and licence of a case's dataset (from the user's settings, else from the dataset), and its layout."""
    settings, origin = ref.settings, ref.origin
    return {
        "source": settings.source or origin.source,
        "licence": settings.licence or origin.licence,
        "layout": ref.layout,
    }


def _case_key(ref: CaseRef) -> tuple[str, str]:
    return ref.dataset, ref.case_id
