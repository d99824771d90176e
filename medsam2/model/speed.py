"""How the parts of the network are run: activation checkpointing, compilation, oneDNN, dropout.

None of it changes what is computed (rounding and dropout apart), none of it touches names or shapes of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.utils.checkpoint import checkpoint

from medsam2.model.onednn_linear import use_onednn

if TYPE_CHECKING:
    from medsam2.model.tracker import Tracker

Part = Literal["image_encoder", "memory_attention", "mask_decoder", "memory_encoder"]

# The blocks of a trunk are one function with as many shapes; dynamo's own limit of 8 is below that.
RECOMPILE_LIMIT = 64


class SpeedSettings(BaseModel):
    """What is traded for time or memory, by part of the network; `run` runs a function of a part so.

    Attributes:
        attention_dropout: of the memory attention (its weights, its feed-forward part and what it adds), in training.
            Meta trains with 0.1. On a CPU any value above 0 forces attention to write out its N x L weights: the
            step is slower and needs gigabytes more.
        checkpoint: parts whose activations are computed again in the backward pass instead of being kept.
        compile: parts run through torch.compile: minutes at the start, then faster steps.
        onednn: fp32 matrix products on a CPU by oneDNN instead of MKL (`onednn_linear`); means nothing on a GPU.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention_dropout: float = Field(0.0, ge=0, lt=1)
    checkpoint: tuple[Part, ...] = ()
    compile: tuple[Part, ...] = ()
    onednn: bool = True

    def run(self, part: Part, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)`; tensors that need a gradient must be among the arguments or in modules there."""
        if part in self.compile:
            function = _compiled(function)
        if part in self.checkpoint and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)


def apply_speed(tracker: Tracker, settings: SpeedSettings) -> None:
    """Set how `tracker` runs. Call it once the network is complete (adapters in place, on any device)."""
    set_attention_dropout(tracker.sam, settings.attention_dropout)
    if settings.compile:
        allow_shapes()
    use_onednn(tracker.sam, settings.onednn)
    tracker.speed = settings


def allow_shapes() -> None:
    """Let a compiled function have as many shapes as the network gives it."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)


def set_attention_dropout(sam: nn.Module, share: float) -> None:
    """Set every dropout of the memory attention to `share`, that of adapters (peft's `lora_dropout`) excepted."""
    attention = sam.get_submodule("memory_attention")
    for name, module in attention.named_modules():
        if isinstance(module, nn.Dropout) and name.rpartition(".")[2].startswith("dropout"):
            module.p = share
        if hasattr(module, "dropout_p"):
            module.dropout_p = share


def attention_dropout(sam: nn.Module) -> float:
    """The largest dropout of the memory attention."""
    attention = sam.get_submodule("memory_attention")
    return max((float(getattr(module, "dropout_p", 0.0)) for module in attention.modules()), default=0.0)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function)
    return compiled
