"""Matrix products on a CPU through oneDNN.

PyTorch gives fp32 products to the BLAS that it was built with (MKL), which on many processors is slower than the
oneDNN that it also carries and uses for convolutions and half precision: at the sizes of a training step by a sixth,
but for the products that give the gradients of weights, which stay with MKL.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SMALLEST = 1 << 22
"""Products with fewer multiplications are left to MKL: the way to oneDNN would cost more than it gains."""


class FastLinear(nn.Linear):
    """`nn.Linear` with fp32 products on a CPU by oneDNN, forward and backward; only rounding changes."""

    def forward(self, input: Tensor) -> Tensor:
        if not (_large(input, self.weight) and _possible(input)):
            return super().forward(input)
        if torch.is_grad_enabled():
            # flat, since what oneDNN gives for several dimensions is a view, which nobody may write to afterwards
            output: Tensor = _Product.apply(input.reshape(-1, self.in_features), self.weight, self.bias)
            return output.view(*input.shape[:-1], self.out_features)
        return product(input, self.weight, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        of_x = product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight = gradient.t() @ x if ctx.needs_input_grad[1] else None
        of_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias


def use_fast_linear(module: nn.Module) -> None:
    """Make every plain `nn.Linear` in `module` a `FastLinear`, in place; names and weights stay."""
    for found in module.modules():
        if type(found) is nn.Linear:
            found.__class__ = FastLinear


def fast_products(like: Tensor) -> bool:
    """Whether products with this tensor, without gradients, can go through oneDNN (`product`)."""
    half = like.dtype == torch.bfloat16 and on_cpu(like)
    return not torch.is_grad_enabled() and (half or _possible(like))


def on_cpu(like: Tensor) -> bool:
    """Whether a CPU computes with this tensor and has oneDNN; torch.compile makes a choice of its own."""
    return like.device.type == "cpu" and not torch.compiler.is_compiling() and _linear() is not None


def _possible(like: Tensor) -> bool:
    return like.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") and on_cpu(like)


def _large(x: Tensor, weight: Tensor) -> bool:
    return x.numel() * len(weight) >= SMALLEST and weight.dtype == torch.float32


def _linear() -> Any:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)` by oneDNN; ask `fast_products` before."""
    output: Tensor = _linear()(x, weight, bias, "none", [], "")
    return output
