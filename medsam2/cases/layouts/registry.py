"""The registry of layouts, and the search for cases.

To add a layout, add a file here with `NAME`, `LOOKS_FOR` and two functions: `recognise(path) -> bool` and
`find(path) -> list[CaseRef]`, which reads no voxels. Add `load(ref) -> Case` if `listing.load_listed` does not suffice.
The registry splits slices in time and combines channels. `YIELDS_TO` names layouts that take precedence when both
recognise a folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Protocol

from medsam2.cases.case import Case, CaseError, CaseRef
from medsam2.cases.listing import combine_channels, list_folders, load_listed, split_time_slices
from medsam2.cases.settings import MODALITIES, SettingsBook
from medsam2.errors import UserError, check_choice, did_you_mean
from medsam2.plugins import by_name, modules_of


class Layout(Protocol):
    """The interface of a layout's module."""

    NAME: str
    LOOKS_FOR: str

    def recognise(self, path: Path) -> bool: ...

    def find(self, path: Path) -> list[CaseRef]: ...


@cache
def layouts() -> dict[str, Layout]:
    """Return all layouts by name, one per file of this folder.

    Raises:
        RuntimeError: two files have the same name.
    """
    return by_name(modules_of(__package__, offers="LOOKS_FOR"), "layouts")


def load_case(ref: CaseRef) -> Case:
    """Read the case.

    Raises:
        CaseError: names the file, the fault and the remedy.
    """
    if ref.problem:
        raise CaseError(ref.problem)
    if ref.modality not in MODALITIES:
        fault = f"{ref.modality!r} is not a modality" if ref.modality else "its modality is not known"
        where = ref.images[0] if ref.images else ref.case_id
        remedy = "give --modality (evaluate.py: data.modality), or --config for each dataset (data.config)"
        raise CaseError(f"{where}: {fault}; {remedy}, one of {', '.join(MODALITIES)}.")
    try:
        case: Case = getattr(layouts()[ref.layout], "load", load_listed)(ref)
        return case
    except MemoryError:
        raise CaseError(f"{ref.images[0]}: not enough memory to read it; use fewer --workers.") from None
    except OSError as error:
        raise CaseError(f"{error.filename or ref.images[0]}: {error.strerror or error}.") from None


def find_cases(
    source: Path | str,
    layout: str | None = None,
    modality: str | None = None,
    book: SettingsBook | None = None,
) -> list[CaseRef]:
    """List all cases under `source`, sorted by dataset and name; subfolders may hold several datasets.

    Args:
        layout: the only layout to consider. modality: of every case; overrides the dataset's description.
        book: the user's settings of the datasets.

    Raises:
        UserError: the path does not exist, the layout or modality is unknown, or there is no case.
    """
    source = Path(source)
    if not source.exists():
        missing = source.absolute()
        while not missing.parent.exists():
            missing = missing.parent
        hint = did_you_mean(missing.name, (path.name for path in missing.parent.glob("*")))
        raise UserError(f"{source}: no such file or folder.{hint} {missing.parent} exists.")
    options = layouts()
    if layout is not None:
        check_choice("--layout", layout, options)
    if modality is not None:
        check_choice("--modality", modality, MODALITIES)
    candidates = {layout: options[layout]} if layout else options
    settings = book or SettingsBook()
    refs: list[CaseRef] = []
    for folder, match in _find_datasets(source, candidates, set()):
        relative = folder.relative_to(source).as_posix()
        named = (replace(r, layout=match.NAME, patient_id=r.patient_id or r.case_id) for r in match.find(folder))
        slices = (part for ref in named for part in split_time_slices(ref))
        refs += combine_channels(_with_settings(ref, settings, modality, relative) for ref in slices)
    if not refs:
        patterns = "; ".join(f"{name}: {entry.LOOKS_FOR}" for name, entry in candidates.items())
        raise UserError(f"{source}: no case found. Looked for {patterns}. Check the path, or name a --layout.")
    return _check_unique(sorted(refs, key=lambda r: (r.dataset, r.case_id)))


def _with_settings(ref: CaseRef, book: SettingsBook, modality: str | None, folder: str) -> CaseRef:
    """Add the user's settings of its dataset, which lies in `folder` below the source, to a reference."""
    modality = modality or book.of(ref.dataset, folder=folder).modality or ref.modality
    settings = book.of(ref.dataset, modality, folder)
    patient = settings.patient_of(ref.case_id) or ref.patient_id
    return replace(ref, settings=settings, modality=modality, patient_id=patient)


def _find_datasets(folder: Path, candidates: dict[str, Layout], visited: set[str]) -> Iterator[tuple[Path, Layout]]:
    """Yield the datasets at and below `folder`; the search does not enter a recognised dataset."""
    if (folder / "index.arrow").exists() or folder.resolve().as_posix() in visited:
        return  # shards instead of raw data, or a cyclic link
    visited.add(folder.resolve().as_posix())
    matches = layouts_at(folder, candidates)
    if len(matches) > 1:
        names = " and ".join(entry.NAME for entry in matches)
        raise UserError(f"{folder}: looks like {names}; choose one with --layout.")
    if matches:
        yield folder, matches[0]
    elif folder.is_dir():
        for child in list_folders(folder):
            yield from _find_datasets(child, candidates, visited)


def layouts_at(folder: Path, candidates: dict[str, Layout]) -> list[Layout]:
    """Return the layouts that recognise a folder or file, without those that yield to another of them.

    A manifest takes precedence over all other layouts.
    """
    if folder.is_dir() and "manifest" in candidates and candidates["manifest"].recognise(folder):
        return [candidates["manifest"]]
    recognised = {name: entry for name, entry in candidates.items() if entry.recognise(folder)}
    return [entry for entry in recognised.values() if not {*getattr(entry, "YIELDS_TO", ())} & {*recognised}]


def _check_unique(refs: list[CaseRef]) -> list[CaseRef]:
    """Refuse two cases of the same name in datasets of the same name, since names identify cases in shards."""
    ref_by_name: dict[tuple[str, str], CaseRef] = {}
    for ref in refs:
        other = ref_by_name.setdefault((ref.dataset, ref.case_id), ref)
        if other is not ref:
            raise UserError(
                f"two cases are named {ref.dataset}/{ref.case_id}: {other.images[0]} and {ref.images[0]}; rename one."
            )
    return refs
