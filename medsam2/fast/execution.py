"""How the parts of the network are run: activation checkpointing, compilation, oneDNN, dropout.

None of it changes what is computed (rounding and dropout apart), none of it touches names or shapes of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from medsam2.model.tracker import Tracker

Part = Literal["image_encoder", "memory_attention", "mask_decoder", "memory_encoder"]

MIN_MULTIPLICATIONS = 1 << 22
"""Smaller products are left to MKL: the way to oneDNN would cost more than it gains."""
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
        onednn: fp32 matrix products on a CPU by oneDNN instead of MKL (`OneDnnLinear`); means nothing on a GPU.
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


# oneDNN. PyTorch gives fp32 products to the BLAS that it was built with (MKL), which on many processors is slower than
# the oneDNN that it also carries and uses for convolutions and half precision: at the sizes of a training step by a
# sixth, but for the products that give the gradients of weights, which stay with MKL. The operator is a private one of
# PyTorch, so everything here is for CPUs alone, behind one switch (`model.onednn`): a layer elsewhere is a plain
# `nn.Linear`.


class OneDnnLinear(nn.Linear):
    """`nn.Linear` with fp32 products on a CPU by oneDNN, forward and backward; only rounding changes."""

    def forward(self, input: Tensor) -> Tensor:
        large = input.numel() * self.out_features >= MIN_MULTIPLICATIONS
        if not (large and input.dtype == self.weight.dtype == torch.float32 and can_use_onednn(self, input)):
            return super().forward(input)
        if torch.is_grad_enabled():
            # flat, since what oneDNN gives for several dimensions is a view, which nobody may write to afterwards
            output: Tensor = _Product.apply(input.reshape(-1, self.in_features), self.weight, self.bias)
            return output.view(*input.shape[:-1], self.out_features)
        return product(input, self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OneDnnLinear:
        """What `to`, `cuda` and their like do; a layer that leaves the CPU becomes a plain one."""
        super()._apply(fn, recurse)
        if self.weight.device.type != "cpu":
            self.__class__ = nn.Linear  # type: ignore[assignment]
        return self


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        return (
            product(gradient, weight.t()) if ctx.needs_input_grad[0] else None,
            gradient.t() @ x if ctx.needs_input_grad[1] else None,
            gradient.sum(0) if ctx.needs_input_grad[2] else None,
        )


def use_onednn(module: nn.Module, enabled: bool = True) -> None:
    """Make every plain `nn.Linear` on the CPU in `module` a `OneDnnLinear`, or back; names and weights stay."""
    old, new = (nn.Linear, OneDnnLinear) if enabled else (OneDnnLinear, nn.Linear)
    for layer in module.modules():
        if type(layer) is old and layer.weight.device.type == "cpu":
            layer.__class__ = new


def can_use_onednn(layer: nn.Module, x: Tensor) -> bool:
    """Whether products beside `layer` may go through oneDNN: the switch is on, and nothing else chooses the precision.

    torch.compile makes its own choice of products.
    """
    if not isinstance(layer, OneDnnLinear) or torch.compiler.is_compiling() or _operator() is None:
        return False
    return x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)` by oneDNN, where `can_use_onednn` says so.

    PyTorch itself takes oneDNN for half precision on processors that have it; the operator would fail on others.
    """
    if x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    output: Tensor = _operator()(x, weight, bias, "none", [], "")
    return output


def _operator() -> Any:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
