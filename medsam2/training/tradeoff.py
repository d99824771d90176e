"""One figure for what was gained and what was forgotten, which early stopping and the best checkpoint go by."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

GAIN, RETENTION, START = "val/gain", "val/retention", "_start"
TRADEOFF = "val/tradeoff"


class TradeoffSettings(BaseModel):
    """Weights of gain and retention.

    Attributes:
        gain: weight of the change of DSC on what is learned.
        retention: weight of what is lost on what was known; getting better there does not make up for a missing gain.
        allowed: so much of DSC may be lost at no cost.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    gain: float = Field(1.0, ge=0)
    retention: float = Field(1.0, ge=0)
    allowed: float = Field(0.0, ge=0, le=1)


def tradeoff(values: Mapping[str, float], settings: TradeoffSettings) -> float:
    """`gain` times the change on what is learned, less `retention` times what is lost beyond what is allowed.

    Args:
        values: "val/gain", "val/retention" and the starting model's "..._start"; a kind that validation does not
            have counts as unchanged, and where the start is not known (random weights) it counts as 0.
    """
    change = {key: values[key] - values.get(key + START, 0.0) for key in (GAIN, RETENTION) if key in values}
    lost = min(change.get(RETENTION, 0.0) + settings.allowed, 0.0)
    return settings.gain * change.get(GAIN, 0.0) + settings.retention * lost


def best_monitor(settings: TradeoffSettings | None, cases: int) -> tuple[str, str]:
    """What the best checkpoint goes by, and whether "max" or "min" of it is best."""
    if not cases:
        return "val/loss", "min"
    return (TRADEOFF if settings is not None else "val/dsc"), "max"
