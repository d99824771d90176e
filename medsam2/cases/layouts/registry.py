"""Which layouts exist, and the cases that they find.

To add a layout, add one file here with `NAME`, `LOOKS_FOR` and three functions:
`recognise(path) -> bool`, `find(path) -> list[CaseRef]` (reads no voxels) and `load(ref) -> Case`; where the user's
settings decide what a case is (channels), also `settle(refs) -> list[CaseRef]`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from medsam2.cases.case import MODALITIES, Case, CaseError, Origin
from medsam2.cases.settings import DatasetSettings, SettingsBook
from medsam2.errors import UserError, did_you_mean
from medsam2.plugins import by_name, modules_of


@dataclass(frozen=True)
class CaseRef:
    """A case that was found and not yet read; cheap to keep by the thousand and to send to another process.

    Attributes:
        dataset, case_id, patient_id: names as the source has them.
        layout: the `NAME` of the layout that found it. modality: one of `MODALITIES`, or "" where unknown.
        images, masks: its files or folders.
        labels: (value or values, name) pairs that the data set declares; empty where it declares none.
        spacing: what the data set says outside of its files: seconds a frame, mm a pixel; 0 where unknown.
        part: which part of its files the case is, in the layout's own words, e.g. "slice 3" of a 4-D file.
        recist: lines that the data set gives, in the pixels of the source: (slice, x0, y0, x1, y1, name of the label).
        split: the split that the data set itself prescribes, or "".
        origin: what the data set says of itself; what `settings` says goes before it.
        settings: what the user says about its data set.
        problem: why it cannot be read, where finding it already told.
    """

    dataset: str
    case_id: str
    patient_id: str
    layout: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    modality: str = ""
    labels: tuple[tuple[tuple[int, ...], str], ...] = field(default=())
    spacing: tuple[float, float] = (0.0, 0.0)
    part: str = ""
    recist: tuple[tuple[int, float, float, float, float, str], ...] = ()
    split: str = ""
    origin: Origin = Origin()
    settings: DatasetSettings = DatasetSettings()
    problem: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        return self.images + self.masks

    def load(self) -> Case:
        """Read the case.

        Raises:
            CaseError: naming the file, what is wrong and the remedy.
        """
        if self.problem:
            raise CaseError(self.problem)
        if self.modality not in MODALITIES:
            found = f"{self.modality!r} is not a modality" if self.modality else "its modality is not known"
            where = self.images[0] if self.images else self.case_id
            how = "give --modality (evaluate.py: data.modality), or --config for each data set (data.config)"
            raise CaseError(f"{where}: {found}; {how}, one of {', '.join(MODALITIES)}.")
        try:
            return layouts()[self.layout].load(self)
        except CaseError:
            raise
        except MemoryError:
            raise CaseError(f"{self.images[0]}: not enough memory to read it; use fewer --workers.") from None
        except OSError as error:
            raise CaseError(f"{error.filename or self.images[0]}: {error.strerror or error}.") from None


class Layout(Protocol):
    """What a layout's module offers."""

    NAME: str
    LOOKS_FOR: str

    def recognise(self, path: Path) -> bool: ...

    def find(self, path: Path) -> list[CaseRef]: ...

    def load(self, ref: CaseRef) -> Case: ...


@cache
def layouts() -> dict[str, Layout]:
    """Every layout by name, one a file of this folder.

    Raises:
        RuntimeError: two files claim one name.
    """
    return collect(modules_of(__package__, skip=("registry", "meta")))


def collect(modules: Iterable[Any]) -> dict[str, Layout]:
    """Modules by their `NAME`; a name that is taken is refused."""
    return by_name(modules, "layouts")


def find_cases(
    source: Path | str,
    layout: str | None = None,
    modality: str | None = None,
    book: SettingsBook | None = None,
) -> list[CaseRef]:
    """Every case under `source`, sorted by data set and name; sub-folders may hold several data sets.

    Args:
        layout: consider this one alone. modality: what every case is, whatever the data set says.
        book: what the user says about the data sets.

    Raises:
        UserError: no such path, unknown layout or modality, or nothing found.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder.{_closest(source)}")
    options = layouts()
    if layout is not None and layout not in options:
        raise UserError(f"--layout {layout!r} is not one of {', '.join(options)}.{did_you_mean(layout, options)}")
    if modality is not None and modality not in MODALITIES:
        hint = did_you_mean(modality.upper(), MODALITIES)
        raise UserError(f"--modality {modality!r} is not one of {', '.join(MODALITIES)}.{hint}")
    tried = {layout: options[layout]} if layout else options
    settings = book or SettingsBook()
    refs: list[CaseRef] = []
    for place, found in _recognised(source, tried, set()):
        below = place.relative_to(source).as_posix()
        at_place = [_with_settings(ref, settings, modality, below) for ref in found.find(place)]
        settle = getattr(found, "settle", None)
        refs += settle(at_place) if settle else at_place
    if not refs:
        looked = "; ".join(f"{name}: {entry.LOOKS_FOR}" for name, entry in tried.items())
        raise UserError(f"{source}: no case found. Looked for {looked}. Check the path, or name a --layout.")
    return _unique(sorted(refs, key=lambda r: (r.dataset, r.case_id)))


def _with_settings(ref: CaseRef, book: SettingsBook, modality: str | None, place: str) -> CaseRef:
    """The reference under what the user says of its data set, which lies at `place` below the source."""
    modality = modality or book.of(ref.dataset, place=place).modality or ref.modality
    settings = book.of(ref.dataset, modality, place)
    patient = settings.patient_of(ref.case_id) or ref.patient_id
    return replace(ref, settings=settings, modality=modality, patient_id=patient)


def _recognised(place: Path, tried: dict[str, Layout], seen: set[str]) -> Iterator[tuple[Path, Layout]]:
    """The data sets at and below `place`; what is inside a recognised one is not looked at again."""
    if (place / "index.arrow").exists() or place.resolve().as_posix() in seen:
        return  # shards, not raw data; or a link that leads back
    seen.add(place.resolve().as_posix())
    if "manifest" in tried and place.is_dir() and tried["manifest"].recognise(place):
        # the folder says itself what its cases are: nothing else is looked for there
        yield place, tried["manifest"]
        return
    matches = [entry for entry in tried.values() if entry.recognise(place)]
    if len(matches) > 1:
        names = " and ".join(entry.NAME for entry in matches)
        raise UserError(f"{place}: looks like {names}; say which with --layout.")
    if matches:
        yield place, matches[0]
    elif place.is_dir():
        for child in sorted(Path(entry.path) for entry in os.scandir(place) if entry.is_dir()):
            if not child.name.startswith("."):
                yield from _recognised(child, tried, seen)


def _unique(refs: list[CaseRef]) -> list[CaseRef]:
    """Refuse two data sets of one name that hold a case of one name: their shards could not be told apart."""
    seen: dict[tuple[str, str], CaseRef] = {}
    for ref in refs:
        other = seen.setdefault((ref.dataset, ref.case_id), ref)
        if other is not ref:
            raise UserError(
                f"two cases are named {ref.dataset}/{ref.case_id}: {other.images[0]} and {ref.images[0]}; rename one."
            )
    return refs


def _closest(path: Path) -> str:
    """A hint at the sibling that was probably meant: of the first part of the path that does not exist."""
    parent, missing = path.absolute().parent, path.absolute()
    while not parent.exists():
        parent, missing = parent.parent, parent
    try:
        siblings = [p.name for p in parent.iterdir()]
    except OSError:
        return ""
    hint = did_you_mean(missing.name, siblings)
    return f"{hint} (in {parent})" if hint else f" {parent} exists."
