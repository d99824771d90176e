"""The table of structure families with their modalities, and the choice of families for a dataset."""

from __future__ import annotations

from dataclasses import dataclass

from medsam2.errors import UserError, check_choice

PHANTOM_MODALITIES: tuple[str, ...] = ("CT", "MR", "US", "ENDOSCOPY")


@dataclass(frozen=True)
class Family:
    """A kind of structure with one label.

    Attributes:
        modalities: modalities in which it exists.
        share: probability that a case labels it, if `only` is not given.
        min_pixels: minimum area of a labelled structure on its largest frame.
    """

    modalities: tuple[str, ...]
    share: float
    min_pixels: int


FAMILIES: dict[str, Family] = {
    "organ": Family(("CT", "MR", "US", "ENDOSCOPY"), 0.85, 400),
    "kidney": Family(("CT", "MR", "US"), 0.75, 250),
    "lesion": Family(("CT", "MR", "US", "ENDOSCOPY"), 0.8, 120),
    "vessel": Family(("CT", "MR", "US", "ENDOSCOPY"), 0.7, 110),
    "wall": Family(("CT", "MR", "US", "ENDOSCOPY"), 0.6, 250),
    "instrument": Family(("ENDOSCOPY",), 0.75, 250),
}


@dataclass(frozen=True)
class Choice:
    """The families that cases of one modality may show.

    Attributes:
        labels: names of the families with a label, in the order of their ids (1, 2, ...).
        clutter: families that may be in the picture without a label (those that `only` leaves out).
        label_all: whether each case labels all of `labels` (`only` was given) instead of a random part of them.
    """

    labels: tuple[str, ...]
    clutter: tuple[str, ...]
    label_all: bool

    def label_ids(self) -> dict[str, int]:
        """Map family names to values in the label files, consecutive from 1."""
        return {name: position for position, name in enumerate(self.labels, start=1)}


def check_modality(modality: str) -> str:
    """Return the upper-case name of a phantom modality.

    Raises:
        UserError: there are no phantoms of this modality.
    """
    check_choice("modality", modality.upper(), PHANTOM_MODALITIES)
    return modality.upper()


def check_families(names: tuple[str, ...], option: str) -> tuple[str, ...]:
    """Return `names` without repetition, in the order of the table.

    Raises:
        UserError: a family is unknown; the message suggests the closest one.
    """
    for name in names:
        check_choice(option, name, FAMILIES)
    return tuple(name for name in FAMILIES if name in names)


def choose(modality: str, only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Choice:
    """Choose the families of one modality by `only` and `without`.

    Raises:
        UserError: a family or the modality is unknown, or no family is left.
    """
    modality = check_modality(modality)
    only, without = check_families(tuple(only), "--only"), check_families(tuple(without), "--without")
    available = tuple(name for name, f in FAMILIES.items() if modality in f.modalities and name not in without)
    labels = tuple(name for name in available if not only or name in only)
    if not labels:
        options = f"--only {' '.join(only)}" if only else ""
        options += f" --without {' '.join(without)}" if without else ""
        remaining = ", ".join(available) or "none left"
        raise UserError(f"{options.strip()} leaves no family for {modality}; it has {remaining}.")
    return Choice(labels, tuple(name for name in available if name not in labels), bool(only))
