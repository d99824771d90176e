"""Backward passes that keep less: what is cheap to compute again is not stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True)
class _Again:
    """In the place of a stored tensor: its shape."""

    shape: torch.Size


def through(cheap: Callable[[Tensor], Tensor], x: Tensor, costly: Callable[[Tensor], Tensor]) -> Tensor:
    """`costly(cheap(x))`, with `cheap(x)` computed again in the backward pass and not kept until then.

    Autograd keeps the input of a norm or an activation, and its output once more as the input of the projection that
    follows: of a transformer block's 16 numbers a token and channel, 6 are such outputs. To compute them again costs
    less than 1 % of a step, since no matrix product is repeated.

    Args:
        cheap: element-wise or a norm; deterministic. costly: any function; may hold adapters.
    """
    between = cheap(x)
    if not torch.is_grad_enabled():
        return costly(between)
    place, size, kept = between.untyped_storage().data_ptr(), between.numel(), x.detach()

    def pack(tensor: Tensor) -> Any:
        # a cast to half precision is another storage: it is kept, and is half as large
        same = tensor.untyped_storage().data_ptr() == place and tensor.numel() == size and tensor.is_contiguous()
        return _Again(tensor.shape) if same else tensor

    def unpack(stored: Any) -> Tensor:
        if not isinstance(stored, _Again):
            tensor: Tensor = stored
            return tensor
        with torch.no_grad():
            return cheap(kept).reshape(stored.shape)

    with saved_tensors_hooks(pack, unpack):
        return costly(between)
