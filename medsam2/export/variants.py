"""Which weights of a checkpoint are exported, at which input side and precision."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from medsam2.errors import UserError, did_you_mean
from medsam2.model import build
from medsam2.model.adapter import load_merged
from medsam2.model.build import LoadedModel

Weights = Literal["ema", "raw"]
Dtype = Literal["fp32", "bf16"]
CURRENT, AVERAGED = "current_model_state", "averaging_state"  # where Lightning keeps them beside the averaged weights


@dataclass(frozen=True)
class Variant:
    """What `medsam2 export` is asked for beside the format.

    Attributes:
        weights: "ema" (the moving average) or "raw" (those of the step) of a run that averaged; None: what a reader
            takes (the average where there is one).
        dtype: "bf16" rounds all weights to bfloat16; the official file then stores them so, at half the size. Readers
            compute in float32 either way.
        image_size: side of the model's input in px, None for the checkpoint's own.
    """

    weights: Weights | None = None
    dtype: Dtype = "fp32"
    image_size: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("--weights", self.weights, get_args(Weights)),
            ("--dtype", self.dtype, get_args(Dtype)),
        ):
            if value is not None and value not in known:
                raise UserError(f"{name} {value}: choose {' or '.join(known)}.{did_you_mean(value, known)}")

    @property
    def plain(self) -> bool:
        return self == Variant()


def load_variant(checkpoint: str | Path, variant: Variant) -> LoadedModel:
    """The network of a checkpoint as `variant` asks; its metadata says so.

    Raises:
        UserError: the checkpoint does not load, or does not have these weights.
    """
    loaded = build.load_model(checkpoint)
    if variant.weights is not None:
        loaded = _weights(loaded, variant.weights)
    if variant.image_size is not None and variant.image_size != loaded.spec.image_size:
        loaded = _resized(loaded, variant.image_size)
    if variant.dtype == "bf16":
        state = {key: value.to(torch.bfloat16).float() for key, value in loaded.sam.state_dict().items()}
        loaded.sam.load_state_dict(state)
        loaded = replace(loaded, metadata={**loaded.metadata, "dtype": "bf16"})
    return loaded


def _weights(loaded: LoadedModel, wanted: Weights) -> LoadedModel:
    path = Path(loaded.source)
    current = read_current(path)
    if current is None:
        raise UserError(
            f"--weights {wanted}: {path} has one set of weights, without a moving average; leave the option out. "
            "(A run keeps both with ema=0.999.)"
        )
    if wanted == "ema":
        return replace(loaded, metadata={**loaded.metadata, "weights": "moving average"})
    sam = build.build_sam(loaded.spec)
    state = build.clean_state(current)
    if not load_merged(sam, state, loaded.metadata, str(path)):
        build.load_strictly(sam, state, path)
    return replace(loaded, sam=sam.eval(), metadata={**loaded.metadata, "weights": "of the last step, not averaged"})


def read_current(path: Path) -> Mapping[str, Any] | None:
    """The weights of the step of a checkpoint whose main ones are a moving average; None: it has no average."""
    if path.suffix == ".safetensors" or not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError) as error:
        raise UserError(f"{path} is not a readable checkpoint: {error}") from None
    current: Mapping[str, Any] | None = content.get(CURRENT) if AVERAGED in content else None
    return current


def _resized(loaded: LoadedModel, side: int) -> LoadedModel:
    """The same weights at another side: keys and shapes stay, position tables are those of the new one."""
    spec = replace(loaded.spec, image_size=side)
    sam = build.build_sam(spec)
    sam.load_state_dict(loaded.sam.state_dict())
    trained = loaded.metadata.get("trained_image_size", loaded.spec.image_size)
    return replace(loaded, sam=sam.eval(), spec=spec, metadata={**loaded.metadata, "trained_image_size": trained})
