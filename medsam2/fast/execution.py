"""Settings of how the network's parts run: activation checkpointing, compilation, oneDNN, dropout.

None of them changes results (except by rounding and dropout) or the names and shapes of weights.
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
"""Smaller products are left to MKL, since calling oneDNN would cost more time than it saves."""
RECOMPILE_LIMIT = 64
"""All blocks of a trunk are one function called with many shapes, more than the 8 that dynamo allows by default."""


class SpeedSettings(BaseModel):
    """Trade-offs between time and memory, per part of the network.

    Attributes:
        attention_dropout: dropout of the memory attention in training (attention weights, feed-forward layer and
            residuals). Meta trains with 0.1. On a CPU any value above 0 forces attention to materialise its N x L
            weights: the step is slower and needs gigabytes more.
        checkpoint: parts whose activations are recomputed in the backward pass instead of being stored.
        compile: parts run through torch.compile: minutes at the start, then faster steps.
        onednn: compute fp32 matrix products on a CPU by oneDNN instead of MKL (`OneDnnLinear`); no effect on a GPU.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    attention_dropout: float = Field(0.0, ge=0, lt=1)
    checkpoint: tuple[Part, ...] = ()
    compile: tuple[Part, ...] = ()
    onednn: bool = True

    def run(self, part: Part, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function(*arguments)` as `part` is set to run.

        Tensors that need a gradient must be arguments, or parameters of modules that are arguments.
        """
        if part in self.compile:
            function = _compiled(function)
        if part in self.checkpoint and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)


def apply_speed(tracker: Tracker, settings: SpeedSettings) -> None:
    """Apply `settings` to `tracker`. Call it when the network is complete (after adapters, on any device)."""
    set_attention_dropout(tracker.sam, settings.attention_dropout)
    use_onednn(tracker.sam, settings.onednn)
    tracker.speed = settings


def set_attention_dropout(sam: nn.Module, probability: float) -> None:
    """Set every dropout of the memory attention to `probability`, except that of adapters (peft's `lora_dropout`)."""
    attention = sam.get_submodule("memory_attention")
    for name, module in attention.named_modules():
        if isinstance(module, nn.Dropout) and name.rpartition(".")[2].startswith("dropout"):
            module.p = probability
        if hasattr(module, "dropout_p"):
            module.dropout_p = probability


def attention_dropout(sam: nn.Module) -> float:
    """Return the largest dropout probability in the memory attention."""
    attention = sam.get_submodule("memory_attention")
    return max((float(getattr(module, "dropout_p", 0.0)) for module in attention.modules()), default=0.0)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    compiled: Callable[..., Any] = torch.compile(function)
    return compiled


# oneDNN. PyTorch computes fp32 matrix products with the BLAS that it was built with (MKL). On many processors oneDNN,
# which PyTorch also contains and uses for convolutions and half precision, is faster by a sixth at the sizes of a
# training step. Gradients of weights are the exception and stay with MKL. The operator is private to PyTorch; therefore
# it is used only on CPUs and behind one switch (`model.onednn`): on other devices a layer is a plain `nn.Linear`.


class OneDnnLinear(nn.Linear):
    """`nn.Linear` that computes fp32 products on a CPU by oneDNN, forward and backward; only rounding differs."""

    def forward(self, input: Tensor) -> Tensor:
        large = input.numel() * self.out_features >= MIN_MULTIPLICATIONS
        if not (large and input.dtype == self.weight.dtype == torch.float32 and can_use_onednn(self, input)):
            return super().forward(input)
        if torch.is_grad_enabled():
            # For inputs of more than two dimensions oneDNN returns a view, which later in-place operations may not
            # modify; a flat input avoids that.
            output: Tensor = _Product.apply(input.reshape(-1, self.in_features), self.weight, self.bias)
            return output.view(*input.shape[:-1], self.out_features)
        return linear_onednn(input, self.weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OneDnnLinear:
        """Move or cast the layer (`to`, `cuda` ...); a layer that leaves the CPU becomes a plain `nn.Linear`."""
        super()._apply(fn, recurse)
        if self.weight.device.type != "cpu":
            self.__class__ = nn.Linear  # type: ignore[assignment]
        return self


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        return (
            linear_onednn(gradient, weight.t()) if ctx.needs_input_grad[0] else None,
            gradient.t() @ x if ctx.needs_input_grad[1] else None,
            gradient.sum(0) if ctx.needs_input_grad[2] else None,
        )


def use_onednn(module: nn.Module, enabled: bool = True) -> None:
    """Turn every `nn.Linear` on the CPU in `module` into a `OneDnnLinear`, or back; names and weights stay."""
    old, new = (nn.Linear, OneDnnLinear) if enabled else (OneDnnLinear, nn.Linear)
    for layer in module.modules():
        if type(layer) is old and layer.weight.device.type == "cpu":
            layer.__class__ = new


def can_use_onednn(layer: nn.Module, x: Tensor) -> bool:
    """Return whether oneDNN may compute matrix products of `x`.

    It may where `layer`, a layer of the same module, uses oneDNN, and neither autocast nor torch.compile chooses the
    kernel.
    """
    if not isinstance(layer, OneDnnLinear) or torch.compiler.is_compiling() or _operator() is None:
        return False
    return x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"))


def linear_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear(x, weight, bias)` by oneDNN; call it only where `can_use_onednn` is true.

    In half precision PyTorch chooses oneDNN itself on processors that support it; the operator would fail on others.
    """
    if x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    output: Tensor = _operator()(x, weight, bias, "none", [], "")
    return output


def _operator() -> Any:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
