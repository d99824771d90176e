"""Which layouts exist, and the cases that they find.

To add a layout, add one file here with `NAME`, `LOOKS_FOR` and two functions: `recognise(path) -> bool` and
`find(path) -> list[CaseRef]` (reads no voxels); a third, `load(ref) -> Case`, where `listing.load_listed` does not do.
Slices in time and channels are told apart here. `YIELDS_TO` names layouts that go before it where both recognise a
folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Protocol

from medsam2.cases.case import Case, CaseError, CaseRef
from medsam2.cases.listing import combine_channels, load_listed, split_time_slices
from medsam2.cases.settings import MODALITIES, SettingsBook
from medsam2.errors import UserError, check_choice, did_you_mean
from medsam2.plugins import by_name, modules_of


class Layout(Protocol):
    """What a layout's module offers."""

    NAME: str
    LOOKS_FOR: str

    def recognise(self, path: Path) -> bool: ...

    def find(self, path: Path) -> list[CaseRef]: ...


@cache
def layouts() -> dict[str, Layout]:
    """Every layout by name, one a file of this folder.

    Raises:
        RuntimeError: two files claim one name.
    """
    return by_name(modules_of(__package__, offers="LOOKS_FOR"), "layouts")


def load_case(ref: CaseRef) -> Case:
    """Read the case.

    Raises:
        CaseError: naming the file, what is wrong and the remedy.
    """
    if ref.problem:
        raise CaseError(ref.problem)
    if ref.modality not in MODALITIES:
        stated = f"{ref.modality!r} is not a modality" if ref.modality else "its modality is not known"
        where = ref.images[0] if ref.images else ref.case_id
        how = "give --modality (evaluate.py: data.modality), or --config for each dataset (data.config)"
        raise CaseError(f"{where}: {stated}; {how}, one of {', '.join(MODALITIES)}.")
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
    """Every case under `source`, sorted by dataset and name; sub-folders may hold several datasets.

    Args:
        layout: consider this one alone. modality: what every case is, whatever the dataset says.
        book: what the user says about the datasets.

    Raises:
        UserError: no such path, unknown layout or modality, or nothing found.
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
    tried = {layout: options[layout]} if layout else options
    settings = book or SettingsBook()
    refs: list[CaseRef] = []
    for place, found in _recognised(source, tried, set()):
        below = place.relative_to(source).as_posix()
        named = (replace(r, layout=found.NAME, patient_id=r.patient_id or r.case_id) for r in found.find(place))
        slices = (part for ref in named for part in split_time_slices(ref))
        refs += combine_channels(_with_settings(ref, settings, modality, below) for ref in slices)
    if not refs:
        looked = "; ".join(f"{name}: {entry.LOOKS_FOR}" for name, entry in tried.items())
        raise UserError(f"{source}: no case found. Looked for {looked}. Check the path, or name a --layout.")
    return _unique(sorted(refs, key=lambda r: (r.dataset, r.case_id)))


def _with_settings(ref: CaseRef, book: SettingsBook, modality: str | None, place: str) -> CaseRef:
    """The reference under what the user says of its dataset, which lies at `place` below the source."""
    modality = modality or book.of(ref.dataset, folder=place).modality or ref.modality
    settings = book.of(ref.dataset, modality, place)
    patient = settings.patient_of(ref.case_id) or ref.patient_id
    return replace(ref, settings=settings, modality=modality, patient_id=patient)


def _recognised(place: Path, tried: dict[str, Layout], seen: set[str]) -> Iterator[tuple[Path, Layout]]:
    """The datasets at and below `place`; what is inside a recognised one is not looked at again."""
    if (place / "index.arrow").exists() or place.resolve().as_posix() in seen:
        return  # shards, not raw data; or a link that leads back
    seen.add(place.resolve().as_posix())
    matches = layouts_at(place, tried)
    if len(matches) > 1:
        names = " and ".join(entry.NAME for entry in matches)
        raise UserError(f"{place}: looks like {names}; say which with --layout.")
    if matches:
        yield place, matches[0]
    elif place.is_dir():
        for child in sorted(Path(entry.path) for entry in os.scandir(place) if entry.is_dir()):
            if not child.name.startswith("."):
                yield from _recognised(child, tried, seen)


def layouts_at(place: Path, tried: dict[str, Layout]) -> list[Layout]:
    """The layouts that recognise a folder or file, without those that yield to another of them.

    A folder with a manifest says itself what its cases are: nothing else is looked for there.
    """
    if place.is_dir() and "manifest" in tried and tried["manifest"].recognise(place):
        return [tried["manifest"]]
    recognised = {name: entry for name, entry in tried.items() if entry.recognise(place)}
    return [entry for entry in recognised.values() if not {*getattr(entry, "YIELDS_TO", ())} & {*recognised}]


def _unique(refs: list[CaseRef]) -> list[CaseRef]:
    """Refuse two datasets of one name that hold a case of one name: their shards could not be told apart."""
    seen: dict[tuple[str, str], CaseRef] = {}
    for ref in refs:
        other = seen.setdefault((ref.dataset, ref.case_id), ref)
        if other is not ref:
            raise UserError(
                f"two cases are named {ref.dataset}/{ref.case_id}: {other.images[0]} and {ref.images[0]}; rename one."
            )
    return refs
