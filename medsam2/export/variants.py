"""Which weights of a checkpoint are exported, at which input side and precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from medsam2.errors import UserError, did_you_mean
from medsam2.model.build import LoadedModel, build_sam, load_model

Weights = Literal["ema", "raw"]
Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Variant:
    """What `medsam2 export` is asked for beside the format.

    Attributes:
        weights: "ema" (the moving average) or "raw" (those of the last step) of a run that averaged; None: what a
            reader takes (the average where there is one).
        dtype: "bf16" rounds all weights to bfloat16; the official file then stores them so, at half the size. Readers
            compute in float32 either way.
        image_size: side of the model's input in px, None for the checkpoint's own.
    """

    weights: Weights | None = None
    dtype: Dtype = "fp32"
    image_size: int | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("--weights", self.weights, get_args(Weights)),
            ("--dtype", self.dtype, get_args(Dtype)),
        ):
            if value is not None and value not in choices:
                raise UserError(f"{name} {value}: choose {' or '.join(choices)}.{did_you_mean(value, choices)}")


def load_variant(checkpoint: str | Path, variant: Variant) -> LoadedModel:
    """The network of a checkpoint as `variant` asks; its provenance says so.

    Raises:
        UserError: the checkpoint does not load, or does not have these weights.
    """
    averaged = None if variant.weights is None else variant.weights == "ema"
    model = load_model(checkpoint, averaged=averaged)
    stated: dict[str, Any] = {}
    if averaged is not None:
        stated["weights"] = "moving average" if averaged else "of the last step, not averaged"
    state, spec = model.sam.state_dict(), model.spec
    if variant.dtype == "bf16":
        state = {key: value.to(torch.bfloat16).float() for key, value in state.items()}
        stated["dtype"] = "bf16"
    if variant.image_size not in (None, spec.image_size):
        stated["trained_image_size"] = model.provenance.trained_image_size or spec.image_size
        spec = replace(spec, image_size=variant.image_size)
    if not stated:
        return model
    # Keys and shapes are the same at every side; the tables of positions are those of the new one.
    sam = build_sam(spec)
    sam.load_state_dict(state)
    return replace(model, sam=sam.eval(), spec=spec, provenance=model.provenance.model_copy(update=stated))
