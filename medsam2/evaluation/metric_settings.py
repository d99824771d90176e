"""Which scores are computed and at which tolerance: the `metrics` part of configs/evaluate.yaml."""

from __future__ import annotations

import fnmatch
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Tolerance = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MetricSettings(BaseModel):
    """What is scored beyond overlaps; docs/metrics.md defines every score.

    Patterns are those of the shell (`*vessel*`, `lesion`), matched against the structure's name, case and all.

    Attributes:
        nsd_mm: tolerance of the surface Dice for volumes, in mm. nsd_px: for clips and stills, in pixels.
        tolerances: structure pattern -> tolerance, in mm for volumes and in pixels elsewhere; the first pattern that
            fits decides.
        surfaces: NSD, HD95, ASSD and the boundary F of clips; False leaves them out (NaN), which is faster.
        tubes: structures whose centre-line Dice is computed (vessels, airways, catheters).
        instances: structures whose instance F1 is computed: labels that hold many things (nuclei, lesions).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    nsd_mm: Tolerance = 2.0
    nsd_px: Tolerance = 2.0
    tolerances: dict[str, Tolerance] = Field(default_factory=dict)
    surfaces: bool = True
    tubes: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()

    def tolerance(self, structure: str, volume: bool) -> float:
        """Tolerance of the surface Dice of a structure: mm for volumes, pixels for clips and stills."""
        fitting = (value for pattern, value in self.tolerances.items() if fnmatch.fnmatchcase(structure, pattern))
        return next(fitting, self.nsd_mm if volume else self.nsd_px)

    def is_tube(self, structure: str) -> bool:
        """Whether the centre-line Dice of this structure is asked for."""
        return any(fnmatch.fnmatchcase(structure, pattern) for pattern in self.tubes)

    def has_instances(self, structure: str) -> bool:
        """Whether the instance F1 of this structure is asked for."""
        return any(fnmatch.fnmatchcase(structure, pattern) for pattern in self.instances)
