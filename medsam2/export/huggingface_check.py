"""Does transformers give our masks? A folder is loaded by transformers alone, in a process of its own, and compared.

Legend: N objects, T frames, S the model's side in pixels.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medsam2.errors import UserError
from medsam2.export.expected import Item, compared, items_of, run_consumer, together
from medsam2.export.verify import AGREEMENT, ReferenceClip, Verification
from medsam2.model.build import LoadedModel
from medsam2.pixels import resize

LOGITS = 0.01
"""Mask logits may differ by so much. Memories are kept in bfloat16 on both sides, so that one rounding on the way of a
clip shows here; the masks (logits above 0) must agree all the same."""
FROM_A_MASK = "propagation from a mask"
MASK_PROMPT = 0.9
"""Overlap that is asked after a mask prompt. transformers treats it in two ways unlike Meta's predictor and ours: it
keeps the mask in memory at the whole side instead of a quarter (other pixels on the outline), and makes the object
pointer from the best of three candidates instead of the single mask. Logits then differ by tenths in any case."""
CONSUMER = Path(__file__).with_name("huggingface_consumer.py")


def verify_huggingface(ours: LoadedModel, folder: Path, clip: ReferenceClip) -> dict[str, Any]:
    """Load `folder` with transformers in a fresh process, do the same with both, and compare.

    The clip is brought to the model's side first, so that the two ways of resampling pictures do not enter.

    Returns:
        JSON values of `expected.together`; the worst is that of all items but the one from a mask.

    Raises:
        UserError: transformers does not load the folder, or what it gives is not ours.
    """
    square = at_model_side(clip, ours.spec.image_size)
    items = items_of(ours, square, torch.bfloat16)  # as transformers keeps its memories
    try:
        answers = run_consumer(CONSUMER, [folder], items, {"frames": square.frames})
    except UserError as error:
        raise UserError(f"transformers does not open the folder of {ours.source}: {error}") from None
    found = compared(items, answers, square)
    for item, one in zip(items, found, strict=True):
        if not close(item, one):
            raise UserError(
                f"{ours.source}: transformers gives other masks than medsam2 on {clip.name} ({item.name}: overlap "
                f"{one.iou:.4f}, at least {asked(item)} is asked; largest difference of logits "
                f"{one.max_logit_difference:.3g}, at most {LOGITS} is allowed); nothing was written. Please report it "
                "with the model's configuration; --no-verify writes all the same."
            )
    strict = [number for number, item in enumerate(items) if item.name != FROM_A_MASK]
    report = together([items[number] for number in strict], [found[number] for number in strict])
    report["items"] = together(items, found)["items"]
    report |= {
        "loaded": "strictly, by transformers in a process without medsam2",
        "tolerances": {"logits": LOGITS, "iou": AGREEMENT, "iou_after_a_mask_prompt": MASK_PROMPT},
    }
    return report


def asked(item: Item) -> float:
    """The overlap of masks that an item has to reach."""
    return MASK_PROMPT if item.name == FROM_A_MASK else AGREEMENT


def close(item: Item, found: Verification) -> bool:
    """Whether the two sides agree on an item as far as it can be asked."""
    near = found.max_logit_difference <= LOGITS or item.name == FROM_A_MASK
    return near and found.iou >= asked(item) and math.isfinite(found.max_score_difference)


def at_model_side(clip: ReferenceClip, side: int) -> ReferenceClip:
    """The clip as RGB frames uint8 [T, 3, S, S], its boxes scaled along."""
    height, width = clip.frames.shape[-2:]
    frames = (resize(clip.frames, side) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    scale = np.asarray([side / width, side / height] * 2)
    prompts = []
    for prompt in clip.prompts:
        assert prompt.box is not None, "reference clips are boxed"
        x0, y0, x1, y1 = (float(value) for value in np.asarray(prompt.box) * scale)
        prompts.append(replace(prompt, box=(x0, y0, x1, y1)))
    return ReferenceClip(frames, tuple(prompts), clip.name)
