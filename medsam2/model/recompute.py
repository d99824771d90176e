"""Backward passes that keep less: what is cheap to compute again is not stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True)
class _Recompute:
    """Stands for a tensor that is not stored, of this shape."""

    shape: torch.Size


def recompute_input(norm: Callable[[Tensor], Tensor], x: Tensor, projection: Callable[[Tensor], Tensor]) -> Tensor:
    """`projection(norm(x))`, with `norm(x)` computed again in the backward pass and not kept until then.

    Autograd keeps the input of a norm or an activation, and its output once more as the input of the projection that
    follows: of a transformer block's 16 numbers a token and channel, 6 are such outputs. To compute them again costs
    less than 1 % of a step, since no matrix product is repeated.

    Args:
        norm: a norm, or element-wise; deterministic. projection: any function; may hold adapters.
    """
    hidden = norm(x)
    if not torch.is_grad_enabled():
        return projection(hidden)
    address, size, kept = hidden.untyped_storage().data_ptr(), hidden.numel(), x.detach()

    def pack(tensor: Tensor) -> Tensor | _Recompute:
        # a cast to half precision is another storage: it is kept, and is half as large
        same = tensor.untyped_storage().data_ptr() == address and tensor.numel() == size and tensor.is_contiguous()
        return _Recompute(tensor.shape) if same else tensor

    def unpack(stored: Any) -> Tensor:
        if not isinstance(stored, _Recompute):
            tensor: Tensor = stored
            return tensor
        with torch.no_grad():
            return norm(kept).reshape(stored.shape)

    with saved_tensors_hooks(pack, unpack):
        return projection(hidden)


def keep_input(norm: Callable[[Tensor], Tensor], x: Tensor, projection: Callable[[Tensor], Tensor]) -> Tensor:
    """`projection(norm(x))` as autograd has it."""
    return projection(norm(x))
