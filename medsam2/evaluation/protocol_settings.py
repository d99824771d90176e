"""A protocol is data: which slices are prompted, with what, which way masks are carried, and what is scored.

See configs/protocol/ (one yaml a protocol) and docs/protocols.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from medsam2.prompts.given import NEGATIVE_RULES, PROMPT_RULES
from medsam2.prompts.slices import SLICE_RULES

Direction = Literal["forward", "backward", "both", "both_apart", "front_to_end", "alone"]


def _known(what: str, names: Iterable[str]) -> AfterValidator:
    """Refuse a name that no rule has; `medsam2.config.validate` adds which one is closest."""
    expected = ", ".join(names)

    def check(name: str) -> str:
        if name not in expected.split(", "):
            raise PydanticCustomError("unknown_rule", f"no such {what}; known: {{expected}}", {"expected": expected})
        return name

    return AfterValidator(check)


SliceRule = Annotated[str, _known("slice rule", SLICE_RULES)]
PromptRule = Annotated[str, _known("prompt rule", PROMPT_RULES)]
NegativeRule = Annotated[str, _known("rule for negative points", NEGATIVE_RULES)]


class Corrections(BaseModel):
    """Clicks that correct what was predicted: positive on what is missed, negative on what is too much.

    Each is the deepest point of the deeper of the two errors (Euclidean distance transform) on its frame.

    Attributes:
        most: at most so many clicks for one object, the points of the prompt not counted; 0 for none.
        where: "prompted": on the frames that carry the prompt, all of them before anything is carried further.
            "worst": on the frame with the lowest IoU after the whole volume or clip was predicted, and again.
        each: clicks on a frame before everything is predicted anew; on the first frame the prompt counts as one.
        until: stop clicking on an object once its IoU (prompted frames, or all frames) is this high; 1 for never.
        depth: stop once no error on the frame is deeper than so many pixels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    most: int = Field(0, ge=0)
    where: Literal["prompted", "worst"] = "prompted"
    each: int = Field(1, ge=1)
    until: float = Field(1.0, gt=0, le=1)
    depth: float = Field(0.0, ge=0)


class ProtocolSettings(BaseModel):
    """One protocol.

    Attributes:
        slices: the rule that chooses the prompted frames (`medsam2/prompts/slices.py`).
        step: the k of `slices: every`.
        prompt: the rule that makes the prompt of a frame (`medsam2/prompts/given.py`).
        number: at most so many components (clicks, boxes) or so many points (scattered).
        negatives: so many negative points beside the prompt. negatives_from: the rule that places them.
        direction: forward or backward from the prompt; both (forward, then backward, as SAM 2's predictor does);
            both_apart (the two passes share the prompts only); front_to_end (from frame 0, wherever the prompt is);
            alone (each prompted frame for itself, nothing is carried: the frame-wise or image mode).
        candidate: which of several candidate masks is taken: "best" (highest predicted IoU) or "first".
        corrections: correction clicks after the prompt.
        reach: "clip", or "object": nothing is predicted outside the object's first and last frame (a user who marks
            start and end).
        scored: the frames that count: "all"; "present", those that show the object; "inner", without the first and
            last of the clip; "prompted".
        seed: of prompts that are drawn. citation: where the protocol comes from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    slices: SliceRule = "largest"
    step: int = Field(1, ge=1)
    prompt: PromptRule = "box"
    number: int = Field(3, ge=1)
    negatives: int = Field(0, ge=0)
    negatives_from: NegativeRule = "far"
    direction: Direction = "both"
    candidate: Literal["best", "first"] = "best"
    corrections: Corrections = Corrections()
    reach: Literal["clip", "object"] = "clip"
    scored: Literal["all", "present", "inner", "prompted"] = "all"
    seed: int = 0
    citation: str = ""

    @model_validator(mode="after")
    def _makes_sense(self) -> ProtocolSettings:
        mask, several = self.prompt == "mask", PROMPT_RULES[self.prompt].apart
        clicks = self.corrections.most > 0
        senseless = {
            f"negatives={self.negatives} with prompt={self.prompt}: a mask is taken as it is, it has no points; "
            "give negatives=0 or another prompt": mask and self.negatives > 0,
            f"corrections.most={self.corrections.most} with prompt={self.prompt}: its parts are predicted one by one "
            "and joined, so that no click belongs to one of them; give prompt=box or clicks": several and clicks,
            f"corrections.most={self.corrections.most} with prompt=mask and corrections.where=prompted: the prompted "
            "frame is the truth already; give corrections.where=worst": (
                mask and clicks and self.corrections.where == "prompted"
            ),
            "corrections.where=worst with direction=alone: nothing is carried to frames without a prompt; "
            "give corrections.where=prompted": (
                clicks and self.corrections.where == "worst" and self.direction == "alone"
            ),
            f"step={self.step} with slices={self.slices}: it counts for slices=every alone": (
                self.step > 1 and self.slices != "every"
            ),
            f"scored=prompted with direction={self.direction}: score what was carried as well, or give "
            "direction=alone": self.scored == "prompted" and self.direction != "alone",
        }
        for message, wrong in senseless.items():
            if wrong:
                raise ValueError(message)
        return self
