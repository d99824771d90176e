"""How prompts are simulated in training: the recipe of a paper is a set of these numbers (configs/prompts/)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _KindMark:
    """Marks the settings that are weights of kinds of initial prompts."""


Weight = Annotated[float, Field(ge=0), _KindMark()]
Share = Annotated[float, Field(ge=0, le=1)]


class PromptSettings(BaseModel):
    """The simulated-prompt loop (Ravi et al. 2024, arXiv 2408.00714, section 4 and appendix D); the
    defaults are SAM 2's own recipe.

    Pixels are those of the model's input.

    Attributes:
        mask, box, click, points, box_click, recist, recist_box, scribble: weights of the initial prompt's kind
            (`medsam2/prompts/initial/`, one file each); one kind is drawn for a whole batch and step.
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
        box_scale: width and height of a box are multiplied by 1 + box_scale * N(0, 1), each by its own, about the
            box's centre.
        box_grow: every side of a box is moved outwards by a uniform number up to this many 256ths of the input's side.
        box_jitter: noise of every side of a box as a share of the object's width or height, at most `box_jitter_limit`
            pixels. `box_jitter_law`: uniform (up to that share) or normal (with it as standard deviation).
        click_candidates: a click is the deepest of so many uniform draws; 1 is Meta's uniform click. Also of each
            of the positive points.
        positives, negatives: fewest and most points of the kind "points" for one object, inside and outside of it.
        negative_band: negatives lie up to this share of the input's side away from the object, or, with probability
            `negatives_on_others`, on another object of the clip where there is one.
        recist_along: points between the two ends of the RECIST line, evenly spaced. recist_jitter: standard deviation
            of each end as a share of the line's length.
        scribble_points: points along a scribble. scribble_length: its longest reach each way as a share of the
            object's diagonal. scribble_bend: standard deviation of its turning, in radians.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mask: Weight = 0.5
    box: Weight = 0.25
    click: Weight = 0.25
    points: Weight = 0.0
    box_click: Weight = 0.0
    recist: Weight = 0.0
    recist_box: Weight = 0.0
    scribble: Weight = 0.0
    conditioning_frames: int = Field(2, ge=1)
    correction_frames: int = Field(2, ge=0)
    corrections: int = Field(7, ge=0)
    correction_probability: Share = 1.0
    corrected_as_conditioning: bool = True
    from_truth: Share = 0.1
    mask_damage: Share = 0.0
    still_masks: bool = False
    box_scale: float = Field(0.0, ge=0, le=0.15, description="beyond 0.15 a box could turn inside out")
    box_grow: float = Field(0.0, ge=0)
    box_jitter: float = Field(0.1, ge=0)
    box_jitter_limit: float = Field(20.0, ge=0)
    box_jitter_law: Literal["uniform", "normal"] = "uniform"
    click_candidates: int = Field(1, ge=1)
    positives: tuple[int, int] = (1, 5)
    negatives: tuple[int, int] = (0, 3)
    negative_band: float = Field(0.08, gt=0, le=0.5)
    negatives_on_others: Share = 0.5
    recist_along: int = Field(1, ge=0)
    recist_jitter: float = Field(0.0, ge=0, le=0.5)
    scribble_points: int = Field(6, ge=2)
    scribble_length: float = Field(0.75, gt=0, le=2)
    scribble_bend: float = Field(0.6, ge=0)

    @model_validator(mode="after")
    def _usable(self) -> PromptSettings:
        if sum(self.kinds.values()) <= 0:
            raise ValueError(f"at least one of {', '.join(self.kinds)} needs a positive weight")
        for name, fewest in (("positives", 1), ("negatives", 0)):
            low, high = getattr(self, name)
            if not fewest <= low <= high:
                raise ValueError(f"{name} must be [fewest, most] with {fewest} <= fewest <= most, not [{low}, {high}]")
        return self

    @property
    def kinds(self) -> dict[str, float]:
        """The weight of every kind of initial prompt, in the order of declaration (draws depend on it)."""
        fields = type(self).model_fields.items()
        marked = [name for name, field in fields if any(isinstance(entry, _KindMark) for entry in field.metadata)]
        return {name: getattr(self, name) for name in marked}

    def kinds_for(self, num_frames: int) -> dict[str, float]:
        """The weights for clips of a length: `still_masks` decides whether a still may get a mask."""
        others = {name: weight for name, weight in self.kinds.items() if name != "mask"}
        return others if num_frames == 1 and not self.still_masks and sum(others.values()) > 0 else self.kinds
