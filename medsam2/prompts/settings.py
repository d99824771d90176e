"""How prompts are simulated in training: the recipe of a paper is a set of these numbers (configs/prompts/)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class PromptSettings(BaseModel):
    """The simulated-prompt loop (Ravi et al. 2024, arXiv 2408.00714, section 4 and appendix D).

    Attributes:
        mask, box, click: weights of the initial prompt's kind; one kind is drawn for a whole batch and step.
        conditioning_frames: at most so many frames are prompted (uniform from 1; the first is always one of them).
        correction_frames: at most so many frames receive corrections in batches without mask prompts.
        corrections: number of correction clicks on each corrected frame.
        correction_probability: share of the batches without mask prompts that are corrected at all.
        from_truth: probability that a correction click is drawn from the ground truth, not from the error.
        box_jitter: standard deviation of a box corner's noise as a share of the side; `box_jitter_limit` in pixels
            of the model input (Meta: 0.1 of the side, at most 20 px).
        click_candidates: an initial click is the deepest of so many uniform draws; 1 is Meta's uniform click.
        mask_damage: share of mask prompts given to the mask decoder as a damaged dense prompt instead of being
            taken as the frame's output, so that the decoder learns to read masks (0: SAM 2's own training).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mask: float = Field(0.5, ge=0)
    box: float = Field(0.25, ge=0)
    click: float = Field(0.25, ge=0)
    conditioning_frames: int = Field(2, ge=1)
    correction_frames: int = Field(2, ge=0)
    corrections: int = Field(7, ge=0)
    correction_probability: float = Field(1.0, ge=0, le=1)
    from_truth: float = Field(0.1, ge=0, le=1)
    box_jitter: float = Field(0.1, ge=0)
    box_jitter_limit: float = Field(20.0, ge=0)
    click_candidates: int = Field(1, ge=1)
    mask_damage: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _some_kind(self) -> PromptSettings:
        if self.mask + self.box + self.click <= 0:
            raise ValueError("at least one of mask, box and click needs a positive weight")
        return self

    @property
    def kinds(self) -> dict[str, float]:
        return {"mask": self.mask, "box": self.box, "click": self.click}
