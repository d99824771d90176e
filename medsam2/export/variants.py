"""Which weights of a checkpoint are exported, at which input side and precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from medsam2.errors import check_choice
from medsam2.model.build import LoadedModel, build_sam, load_model


def load_variant(
    checkpoint: str | Path, weights: str | None = None, dtype: str = "fp32", image_size: int | None = None
) -> LoadedModel:
    """The network of a checkpoint as `medsam2 export` is asked for it; its provenance says so.

    Args:
        weights: "ema" (the moving average) or "raw" (those of the last step) of a run that averaged; None: what a
            reader takes (the average where there is one).
        dtype: "bf16" rounds all weights to bfloat16; the official file then stores them so, at half the size. Readers
            compute in float32 either way.
        image_size: side of the model's input in px, None for the checkpoint's own.

    Raises:
        UserError: no such choice, the checkpoint does not load, or it does not have these weights.
    """
    check_choice("--weights", weights or "ema", ("ema", "raw"))
    check_choice("--dtype", dtype, ("fp32", "bf16"))
    averaged = None if weights is None else weights == "ema"
    model = load_model(checkpoint, averaged=averaged)
    stated: dict[str, Any] = {}
    if averaged is not None:
        stated["weights"] = "moving average" if averaged else "of the last step, not averaged"
    state, spec = model.sam.state_dict(), model.spec
    if dtype == "bf16":
        state = {key: value.to(torch.bfloat16).float() for key, value in state.items()}
        stated["dtype"] = "bf16"
    if image_size not in (None, spec.image_size):
        stated["trained_image_size"] = model.provenance.trained_image_size or spec.image_size
        spec = replace(spec, image_size=image_size)
    if not stated:
        return model
    # Keys and shapes are the same at every side; the tables of positions are those of the new one.
    sam = build_sam(spec)
    sam.load_state_dict(state)
    return replace(model, sam=sam.eval(), spec=spec, provenance=model.provenance.model_copy(update=stated))
