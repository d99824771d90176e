"""The one table of structure families: in which modality each exists, and how a choice of families is read."""

from __future__ import annotations

from dataclasses import dataclass

from medsam2.errors import UserError, check_choice

PHANTOM_MODALITIES: tuple[str, ...] = ("CT", "MR", "US", "ENDOSCOPY")


@dataclass(frozen=True)
class Family:
    """A kind of structure with one label.

    Attributes:
        modalities: where it exists.
        share: how often a case of the free choice labels it.
        least_pixels: area that a labelled one reaches on its largest frame.
    """

    modalities: tuple[str, ...]
    share: float
    least_pixels: int


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
    """What a set of cases of one modality may show.

    Attributes:
        labels: family names that get a label, in the order of their ids (1, 2, ...).
        clutter: families that may be in the picture without a label (what `only` leaves out).
        every: each case labels all of `labels` (an explicit `only`), instead of a random part of them.
    """

    labels: tuple[str, ...]
    clutter: tuple[str, ...]
    every: bool

    def label_ids(self) -> dict[str, int]:
        """Family name -> value in the label files, consecutive from 1."""
        return {name: position for position, name in enumerate(self.labels, start=1)}


def check_modality(modality: str) -> str:
    """Return the upper-case name of a phantom modality.

    Raises:
        UserError: no phantoms of this modality.
    """
    check_choice("modality", modality.upper(), PHANTOM_MODALITIES)
    return modality.upper()


def check_families(names: tuple[str, ...], option: str) -> tuple[str, ...]:
    """Return `names` without repetition, in the order of the table.

    Raises:
        UserError: an unknown family, with the closest one.
    """
    for name in names:
        check_choice(option, name, FAMILIES)
    return tuple(name for name in FAMILIES if name in names)


def choose(modality: str, only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> Choice:
    """The families of one modality that remain after `only` and `without`.

    Raises:
        UserError: an unknown family or modality, or nothing is left.
    """
    modality = check_modality(modality)
    only, without = check_families(tuple(only), "--only"), check_families(tuple(without), "--without")
    here = tuple(name for name, family in FAMILIES.items() if modality in family.modalities and name not in without)
    labels = tuple(name for name in here if not only or name in only)
    if not labels:
        wanted = f"--only {' '.join(only)}" if only else ""
        unwanted = f" --without {' '.join(without)}" if without else ""
        rest = ", ".join(here) or "none left"
        raise UserError(f"{wanted}{unwanted}".strip() + f" leaves no family for {modality}; it has {rest}.")
    return Choice(labels, tuple(name for name in here if name not in labels), bool(only))
