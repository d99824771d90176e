"""What a robustness run corrupts: see configs/corruption/."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, field_validator

from medsam2.errors import did_you_mean
from medsam2.evaluation.corruptions.registry import SEVERITIES, names, registry


class CorruptionSettings(BaseModel):
    """Corruptions by name, and how severe.

    Attributes:
        names: what is tried on the cases that it makes sense for (`applicable`); empty for no robustness run.
        severities: of 1 to 5, ascending.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: tuple[str, ...] = ()
    severities: tuple[int, ...] = SEVERITIES

    @field_validator("names")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = list(registry())
        for name in value:
            if name not in known:
                raise ValueError(f"{name!r} is no corruption; there are {', '.join(known)}.{did_you_mean(name, known)}")
        if len(set(value)) < len(value):
            raise ValueError(f"a corruption is named twice in {', '.join(value)}; name each once")
        return value

    @field_validator("severities")
    @classmethod
    def _valid(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or any(severity not in SEVERITIES for severity in value):
            raise ValueError(
                f"severities are whole numbers from {SEVERITIES[0]} to {SEVERITIES[-1]}, not {list(value)}"
            )
        return tuple(sorted(set(value)))

    def applicable(self, modality: str, kind: str) -> tuple[str, ...]:
        """Those of `names` that make sense for a case of this modality and kind, in the order given."""
        sensible = names(modality, kind)
        return tuple(name for name in self.names if name in sensible)
