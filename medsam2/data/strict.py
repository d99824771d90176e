"""What the groups of settings in `data/` have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Strict(BaseModel):
    """A group of settings: unknown keys are refused, values are not changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
