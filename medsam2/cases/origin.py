"""Where a data set says that it comes from, and its licence, in words that can hold nobody's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GENERATED = "medsam2 demo cases (generated; no patient data)"
LICENCES = (
    "Apache-2.0", "MIT", "BSD-3-Clause", "CC0-1.0", "CC0", "CC-BY-4.0", "CC-BY-3.0", "CC-BY-SA-4.0", "CC-BY-SA-3.0",
    "CC-BY-ND-4.0", "CC-BY-NC-4.0", "CC-BY-NC-3.0", "CC-BY-NC-SA-4.0", "CC-BY-NC-SA-3.0", "CC-BY-NC-ND-4.0", "ODbL-1.0",
    "PDDL-1.0",
)  # fmt: skip


def _letters(text: str) -> str:
    """Letters and digits alone: "CC-BY-SA 4.0" and "cc by-sa-4.0" are the same licence."""
    return "".join(character for character in text.lower() if character.isalnum())


KNOWN = {_letters(name): name for name in LICENCES}


@dataclass(frozen=True)
class Origin:
    """Source and licence of a data set; "" where it states none, or in words of its own.

    Free text may hold names, of patients too, and goes nowhere (FAULTS rows 25 and 25b): what is kept is one of a few
    known words.
    """

    source: str = ""
    licence: str = ""

    @classmethod
    def stated(cls, description: Mapping[str, Any]) -> Origin:
        """What a `dataset.json`, a data list or a `meta.json` says."""
        said = [_letters(str(description.get(key) or "")) for key in ("licence", "license")]
        licence = next((KNOWN[letters] for letters in said if letters in KNOWN), "")
        return cls(GENERATED if description.get("source") == GENERATED else "", licence)
