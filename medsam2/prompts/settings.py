"""The group `prompts` of the configuration: how training simulates prompts. configs/prompts/ has papers' recipes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medsam2.errors import did_you_mean
from medsam2.prompts.kinds import INITIAL_KINDS

Share = Annotated[float, Field(ge=0, le=1)]
LEGACY_KINDS = ("mask", "box", "click", "points", "box_click", "recist", "recist_box", "scribble")


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BoxSettings(_Group):
    """Noise of simulated boxes. All three kinds of noise are added; 0 turns one off.

    Attributes:
        scale: width and height are each multiplied by 1 + scale * N(0, 1) about the box's centre. Above 0.15 a box
            could turn inside out.
        grow: each side moves outward by a uniform number of up to this many 256ths of the input's side.
        jitter: noise of each side as a share of the object's width or height, at most 20 pixels.
        jitter_law: uniform (up to that share) or normal (with it as standard deviation).
    """

    scale: float = Field(0.0, ge=0, le=0.15)
    grow: float = Field(0.0, ge=0)
    jitter: float = Field(0.1, ge=0)
    jitter_law: Literal["uniform", "normal"] = "uniform"


class PointSettings(_Group):
    """Number of points of the kind "points".

    Attributes:
        positives, negatives: smallest and largest number of points inside (positives) and outside (negatives) of an
            object.
    """

    positives: tuple[int, int] = (1, 5)
    negatives: tuple[int, int] = (0, 3)

    @model_validator(mode="after")
    def _check_order(self) -> PointSettings:
        for name, minimum in (("positives", 1), ("negatives", 0)):
            low, high = getattr(self, name)
            if not minimum <= low <= high:
                raise ValueError(f"{name} must be [low, high] with {minimum} <= low <= high, not [{low}, {high}]")
        return self


class RecistSettings(_Group):
    """Noise of simulated RECIST lines.

    Attributes:
        jitter: standard deviation of each end, as a share of the line's length.
    """

    jitter: float = Field(0.0, ge=0, le=0.5)


class ScribbleSettings(_Group):
    """Shape of simulated scribbles.

    Attributes:
        length: largest length of each half, as a share of the diagonal of the object's box.
        bend: standard deviation of the heading's slowest wave, in radians.
    """

    length: float = Field(0.75, gt=0, le=2)
    bend: float = Field(0.6, ge=0)


class PromptSettings(_Group):
    """Simulation of prompts in training. The defaults are SAM 2's recipe (Ravi et al. 2024, arXiv 2408.00714, section 4
    and appendix D).

    Pixels are those of the model's input.

    Attributes:
        kinds: weights of the kinds of initial prompts (`medsam2/prompts/initial.py`); one kind is drawn per batch. The
            order of the names matters to the random numbers.
        conditioning_frames: largest number of prompted frames (uniform from 1; the first frame is one of them).
        correction_frames: largest number of corrected frames in batches without mask prompts.
        corrections: number of correction clicks per corrected frame.
        correction_probability: share of the batches without mask prompts that are corrected.
        corrected_as_conditioning: whether a corrected frame enters the memory as a conditioning frame.
        from_truth: probability that a correction click is drawn from the ground truth, not from the error.
        mask_damage: share of mask prompts that the mask decoder gets as a damaged dense prompt, so that it learns to
            read masks. The others become the frame's output, as do all in SAM 2's training (0).
        still_masks: whether stills get mask prompts, which are always damaged ones, since a mask that becomes the
            output of the only frame gives no training signal.
        click_candidates: each click and each positive point is the deepest of this many uniform draws; 1 is Meta's
            uniform click.
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
    def _convert_legacy(cls, values: Any) -> Any:
        """Convert the flat settings of checkpoints from before `kinds`, such as the one that the package contains.

        Only what is read from checkpoints remains: kinds of prompts, corrections and negative points.
        """
        if not isinstance(values, dict) or "kinds" in values or "box_jitter" not in values:
            return values
        corrections = {name: values[name] for name in values if "correct" in name}
        kinds = {name: values[name] for name in LEGACY_KINDS if name in values}
        return {**corrections, "kinds": kinds, "points": {"negatives": values["negatives"]}}

    @model_validator(mode="after")
    def _check_kinds(self) -> PromptSettings:
        for name in self.kinds:
            if name not in INITIAL_KINDS:
                known = ", ".join(INITIAL_KINDS)
                raise ValueError(f"kinds.{name}: the kinds are {known}.{did_you_mean(name, INITIAL_KINDS)}")
        if sum(self.kinds.values()) <= 0:
            raise ValueError(f"at least one of {', '.join(self.kinds)} needs a positive weight")
        return self

    def kinds_for(self, num_frames: int) -> dict[str, float]:
        """Return the weights for clips of `num_frames`; those of stills include masks only with `still_masks`."""
        others = {name: weight for name, weight in self.kinds.items() if name != "mask"}
        return others if num_frames == 1 and not self.still_masks and sum(others.values()) > 0 else self.kinds
