"""How prompts are simulated in training: the recipe of a paper is a set of these numbers (configs/prompts/)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medsam2.errors import did_you_mean
from medsam2.prompts.kinds import INITIAL_KINDS

Share = Annotated[float, Field(ge=0, le=1)]
EARLIER_KINDS = ("mask", "box", "click", "points", "box_click", "recist", "recist_box", "scribble")


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BoxSettings(_Group):
    """How imprecisely a box is drawn; the three add up, and 0 turns each off.

    Attributes:
        scale: width and height are multiplied by 1 + scale * N(0, 1), each by its own, about the box's centre. Beyond
            0.15 a box could turn inside out.
        grow: every side is moved outwards by a uniform number up to this many 256ths of the input's side.
        jitter: noise of every side as a share of the object's width or height, at most 20 pixels.
        jitter_law: uniform (up to that share) or normal (with it as standard deviation).
    """

    scale: float = Field(0.0, ge=0, le=0.15)
    grow: float = Field(0.0, ge=0)
    jitter: float = Field(0.1, ge=0)
    jitter_law: Literal["uniform", "normal"] = "uniform"


class PointSettings(_Group):
    """How many points the kind "points" has.

    Attributes:
        positives, negatives: fewest and most points for one object, inside (positives) and outside of it (negatives).
    """

    positives: tuple[int, int] = (1, 5)
    negatives: tuple[int, int] = (0, 3)

    @model_validator(mode="after")
    def _ordered(self) -> PointSettings:
        for name, fewest in (("positives", 1), ("negatives", 0)):
            low, high = getattr(self, name)
            if not fewest <= low <= high:
                raise ValueError(f"{name} must be [fewest, most] with {fewest} <= fewest <= most, not [{low}, {high}]")
        return self


class RecistSettings(_Group):
    """jitter: standard deviation of each end of the RECIST line, as a share of the line's length."""

    jitter: float = Field(0.0, ge=0, le=0.5)


class ScribbleSettings(_Group):
    """How a scribble runs.

    Attributes:
        length: longest reach each way, as a share of the object's diagonal.
        bend: deviation of its turning, in radians.
    """

    length: float = Field(0.75, gt=0, le=2)
    bend: float = Field(0.6, ge=0)


class PromptSettings(_Group):
    """The simulated-prompt loop (Ravi et al. 2024, arXiv 2408.00714, section 4 and appendix D); the
    defaults are SAM 2's own recipe.

    Pixels are those of the model's input.

    Attributes:
        kinds: weights of the initial prompt's kinds (`medsam2/prompts/initial.py`); one kind is drawn for a whole batch
            and step. Draws depend on the order of the names.
        conditioning_frames: at most so many frames are prompted (uniform from 1; the first is always one of them).
        correction_frames: at most so many frames receive corrections in batches without mask prompts.
        corrections: number of correction clicks on each corrected frame.
        correction_probability: share of the batches without mask prompts that are corrected at all.
        corrected_as_conditioning: whether a frame that was corrected enters the memory as a conditioning frame.
        from_truth: probability that a correction click is drawn from the ground truth, not from the error.
        mask_damage: share of mask prompts given to the mask decoder as a damaged dense prompt instead of being
            taken as the frame's output, so that the decoder learns to read masks (0: SAM 2's own training).
        still_masks: whether stills get mask prompts (always damaged ones: a mask taken as the output of the only
            frame teaches nothing); otherwise the kinds but mask share the stills.
        click_candidates: a click is the deepest of so many uniform draws; 1 is Meta's uniform click. Also of each
            of the positive points.
        box, points, recist, scribble: how the prompts of these kinds are drawn.
    """

    kinds: dict[str, Annotated[float, Field(ge=0)]] = {"mask": 0.5, "box": 0.25, "click": 0.25}
    conditioning_frames: int = Field(2, ge=1)
    correction_frames: int = Field(2, ge=0)
    corrections: int = Field(7, ge=0)
    correction_probability: Share = 1.0
    corrected_as_conditioning: bool = True
    from_truth: Share = 0.1
    mask_damage: Share = 0.0
    still_masks: bool = False
    click_candidates: int = Field(1, ge=1)
    box: BoxSettings = BoxSettings()
    points: PointSettings = PointSettings()
    recist: RecistSettings = RecistSettings()
    scribble: ScribbleSettings = ScribbleSettings()

    @model_validator(mode="before")
    @classmethod
    def _recorded_earlier(cls, values: Any) -> Any:
        """Checkpoints from before `kinds`, the shipped one among them, record all settings side by side.

        What is asked of a checkpoint is kept: which kinds of prompts, corrections and negative points it has seen.
        """
        if not isinstance(values, dict) or "kinds" in values or "box_jitter" not in values:
            return values
        kept = {name: values[name] for name in values if "correct" in name}
        kinds = {name: values[name] for name in EARLIER_KINDS if name in values}
        return {**kept, "kinds": kinds, "points": {"negatives": values["negatives"]}}

    @model_validator(mode="after")
    def _usable(self) -> PromptSettings:
        for name in self.kinds:
            if name not in INITIAL_KINDS:
                known = ", ".join(INITIAL_KINDS)
                raise ValueError(f"kinds.{name}: there are {known}.{did_you_mean(name, INITIAL_KINDS)}")
        if sum(self.kinds.values()) <= 0:
            raise ValueError(f"at least one of {', '.join(self.kinds)} needs a positive weight")
        return self

    def kinds_for(self, num_frames: int) -> dict[str, float]:
        """The weights for clips of a length: `still_masks` decides whether a still may get a mask."""
        others = {name: weight for name, weight in self.kinds.items() if name != "mask"}
        return others if num_frames == 1 and not self.still_masks and sum(others.values()) > 0 else self.kinds
