"""The settings of an evaluation, validated at the start: see configs/evaluate.yaml and configs/protocol/."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from medsam2.prompts.strategies import SliceRule

PromptRule = Literal["box", "click", "clicks", "mask"]
Direction = Literal["forward", "backward", "both", "both_apart", "front_to_end"]


class ProtocolSettings(BaseModel):
    """One protocol: which slices are prompted, with what, and which way the masks are carried.

    Attributes:
        slices: first, middle, last, largest or spread (`prompts.strategies.select_frames`).
        prompt: box (tight), click (one point, deepest in the largest component), clicks (one in each of up to
            three components), or mask (the ground truth of that slice).
        direction: forward or backward from the prompt; both (forward, then backward, as SAM 2's predictor does);
            both_apart (the two passes share the prompts only); front_to_end (from frame 0, wherever the prompt is).
        citation: where the protocol comes from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    slices: SliceRule = "largest"
    prompt: PromptRule = "box"
    direction: Direction = "both"
    citation: str = ""


class SourceSettings(BaseModel):
    """What is evaluated: a folder of shards, or a raw data set in any layout that `medsam2 prepare` reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    layout: str | None = None
    modality: str | None = None


class EvaluateSettings(BaseModel):
    """Everything that `evaluate.py` needs.

    Attributes:
        checkpoint: one or several names ("nano") or paths; the first is the baseline of every comparison.
        labels: how the checkpoints are called in tables (default: short names made from the paths).
        split: the split of a shard folder ("all" for every split). limit: cases per data set, 0 for all.
        structures: keep only these structure names (empty: all).
        nsd_mm, nsd_px: tolerance of the surface Dice for volumes in mm, for clips and stills in pixels.
        overlays: pictures per modality and structure. seed: of the bootstrap. resamples: of the bootstrap.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str | tuple[str, ...]
    data: SourceSettings
    protocol: ProtocolSettings
    output: str
    labels: tuple[str, ...] = ()
    split: str = "val"
    limit: int = Field(0, ge=0)
    structures: tuple[str, ...] = ()
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_frames: int = Field(8, ge=1)
    nsd_mm: float = Field(2.0, ge=0)
    nsd_px: float = Field(2.0, ge=0)
    overlays: int = Field(2, ge=0)
    seed: int = 0
    resamples: int = Field(5000, ge=100)

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """The checkpoints in order, also where one alone was given."""
        return (self.checkpoint,) if isinstance(self.checkpoint, str) else self.checkpoint
