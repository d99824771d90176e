"""Which parameters are trained: by patterns over SAM 2's own parameter names.

Room for LoRA and its relatives is a second class here (FIELD names the targets); the tracker does not change.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from torch import nn

from medsam2.errors import UserError

MODULES: dict[str, str] = {
    "image_encoder": r"image_encoder\.",
    "prompt_encoder": r"sam_prompt_encoder\.|mask_downsample\.",
    "mask_decoder": r"sam_mask_decoder\.",
    "memory_attention": r"memory_attention\.|no_mem_embed|no_mem_pos_enc|maskmem_tpos_enc",
    "memory_encoder": r"memory_encoder\.|no_obj_embed_spatial",
    "object_pointer": r"obj_ptr_|no_obj_ptr",
}
# The package keeps it, but with `directly_add_no_mem_embed` (all official sizes) no output depends on it.
NEVER_USED = ("no_mem_pos_enc",)


class AdaptationSettings(BaseModel):
    """What is trained.

    Attributes:
        train: names of modules (image_encoder, prompt_encoder, mask_decoder, memory_attention, memory_encoder,
            object_pointer) or regular expressions matched from the start of a parameter's name; ["all"] for all.
        freeze: the same, taken away from `train`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: tuple[str, ...] = ("all",)
    freeze: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModuleShare:
    """One row of the start-up table: parameters of a module, and how many of them are trained."""

    module: str
    parameters: int
    trained: int


def apply_adaptation(sam: nn.Module, settings: AdaptationSettings) -> list[ModuleShare]:
    """Set `requires_grad` of every parameter of `sam`; return the table of modules.

    Raises:
        UserError: a pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in sam.named_parameters()]
    train = [_matcher(pattern, names) for pattern in settings.train]
    freeze = [_matcher(pattern, names) for pattern in settings.freeze]
    for name, parameter in sam.named_parameters():
        chosen = any(m.match(name) for m in train) and not any(m.match(name) for m in freeze)
        parameter.requires_grad_(chosen and name not in NEVER_USED)
    if not any(p.requires_grad for p in sam.parameters()):
        raise UserError(f"adaptation.train={list(settings.train)} leaves nothing to train; remove some of freeze.")
    return module_table(sam)


def module_of(name: str) -> str:
    """The module (a key of `MODULES`) that a parameter's name belongs to, or "other"."""
    return next((module for module, pattern in MODULES.items() if re.match(pattern, name)), "other")


def module_table(sam: nn.Module) -> list[ModuleShare]:
    """Parameters and trained parameters of each module, in the order of `MODULES`."""
    counts = {module: [0, 0] for module in [*MODULES, "other"]}
    for name, parameter in sam.named_parameters():
        row = counts[module_of(name)]
        row[0] += parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    return [ModuleShare(module, total, trained) for module, (total, trained) in counts.items() if total]


def _matcher(pattern: str, names: list[str]) -> re.Pattern[str]:
    try:
        compiled = re.compile(".*" if pattern == "all" else MODULES.get(pattern, pattern))
    except re.error as error:
        raise UserError(f"adaptation pattern {pattern!r} is not a regular expression: {error}") from None
    if not any(compiled.match(name) for name in names):
        known = ", ".join(["all", *MODULES])
        raise UserError(f"adaptation pattern {pattern!r} matches no parameter; known modules: {known}.")
    return compiled
