"""Select the trained parameters: by patterns over SAM 2's parameter names, by adapters (`lora.py`), or by both."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict
from torch import nn

from medsam2.adaptation.lora import PeftSettings, adapter_names, inject, official_name
from medsam2.errors import UserError

MODULES: dict[str, str] = {
    "image_encoder": r"image_encoder\.",
    "prompt_encoder": r"sam_prompt_encoder\.|mask_downsample\.",
    "mask_decoder": r"sam_mask_decoder\.",
    "memory_attention": r"memory_attention\.|no_mem_embed|no_mem_pos_enc|maskmem_tpos_enc",
    "memory_encoder": r"memory_encoder\.|no_obj_embed_spatial",
    "object_pointer": r"obj_ptr_|no_obj_ptr",
}
# With `directly_add_no_mem_embed` (all official sizes) no output depends on this parameter.
UNUSED_PARAMETERS = ("no_mem_pos_enc",)


class AdaptationSettings(BaseModel):
    """Settings of the trained parameters.

    Attributes:
        train: names of modules (image_encoder, prompt_encoder, mask_decoder, memory_attention, memory_encoder,
            object_pointer) or regular expressions matched from the start of a parameter's name; ["all"] for all,
            [] to train only adapters.
        freeze: module names or regular expressions likewise, excluded from `train`.
        peft: adapters, trained in addition to `train`; None for no adapters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: tuple[str, ...] = ("all",)
    freeze: tuple[str, ...] = ()
    peft: PeftSettings | None = None


def apply_adaptation(sam: nn.Module, settings: AdaptationSettings) -> None:
    """Inject adapters into `sam` and set `requires_grad` of every parameter.

    Raises:
        UserError: a pattern or a target matches nothing, a layer is both adapted and trained in full, or nothing is
            left to train.
    """
    names = [name for name, _ in sam.named_parameters()]
    train = [_compile_pattern(pattern, names) for pattern in settings.train]
    freeze = [_compile_pattern(pattern, names) for pattern in settings.freeze]
    trained = {
        name
        for name in set(names) - set(UNUSED_PARAMETERS)
        if any(pattern.match(name) for pattern in train) and not any(pattern.match(name) for pattern in freeze)
    }
    if not trained and settings.peft is None:
        raise UserError(
            f"adaptation.train={list(settings.train)} leaves nothing to train; name a module in train, or remove some "
            "of freeze."
        )
    if settings.peft is not None:
        inject(sam, settings.peft, trained)
    in_adapter = adapter_names([name for name, _ in sam.named_parameters()])
    for name, parameter in sam.named_parameters():
        parameter.requires_grad_(name in in_adapter or official_name(name) in trained)


def module_of(name: str) -> str:
    """Return the module (a key of `MODULES`) of a parameter's name, or "other"."""
    return next((module for module, pattern in MODULES.items() if re.match(pattern, name)), "other")


def _compile_pattern(pattern: str, names: list[str]) -> re.Pattern[str]:
    """Compile a module name or a regular expression; refuse one that matches none of `names`."""
    try:
        compiled = re.compile(".*" if pattern == "all" else MODULES.get(pattern, pattern))
    except re.error as error:
        raise UserError(f"adaptation pattern {pattern!r} is not a regular expression: {error}") from None
    if not any(compiled.match(name) for name in names):
        known = ", ".join(["all", *MODULES])
        raise UserError(f"adaptation pattern {pattern!r} matches no parameter; known modules: {known}.")
    return compiled
