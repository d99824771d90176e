"""The memory attention: what `sam2`'s `MemoryAttention.forward` computes, with work shared by the objects of a clip.

Legend: U frames, N objects on them, C hidden width, M memory width, h and w = S / 16, Q = h * w, L memory tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medsam2.model.speed import SpeedSettings


def attend_memory(
    attention: Any,
    frames: Tensor,
    owner: Tensor | None,
    position: Tensor,
    memory: Tensor,
    place: Tensor,
    pointer_tokens: int,
    speed: SpeedSettings,
) -> Tensor:
    """Features conditioned on memory: [N, C, h, w].

    Args:
        frames: [U, C, h, w]. owner: int64 [N], the frame of each object; None where U = N, one for each.
        position: [1, C, h, w]. memory: [N, L, M]. place: [1, L, M], the encoding of place and time of each token.
        pointer_tokens: so many tokens at the end of `memory` have no place in the image.

    Until the first layer has looked at the memory, objects of one frame have the same features: its self-attention
    runs once a frame.
    """
    here = position.flatten(2).transpose(1, 2)
    x = frames.flatten(2).transpose(1, 2) + 0.1 * here
    keys = memory + place
    lean = "memory_attention" not in speed.checkpoint + speed.compile
    for number, layer in enumerate(attention.layers):
        index = owner if number == 0 else None
        x = speed.run("memory_attention", run_layer, layer, x, index, here, keys, memory, pointer_tokens, lean)
    output: Tensor = attention.norm(x).transpose(1, 2).unflatten(2, frames.shape[-2:])
    return output


def run_layer(
    layer: Any,
    x: Tensor,
    owner: Tensor | None,
    here: Tensor,
    keys: Tensor,
    values: Tensor,
    pointer_tokens: int,
    lean: bool = False,
) -> Tensor:
    """Self-attention [U, Q, C], then cross-attention to memory and the feed-forward part [N, Q, C].

    Args:
        lean: compute the hidden layer of the feed-forward part again in the backward pass: it is 2048 numbers a token,
            and 1 % of a step.
    """
    x = layer._forward_sa(x, here)
    if owner is not None:
        x = x.expand(len(owner), -1, -1) if x.shape[0] == 1 else x[owner]
    attended = _cross_attention(layer.cross_attn_image, layer.norm2(x), keys, values, pointer_tokens)
    x = x + layer.dropout2(attended)
    if lean and torch.is_grad_enabled():
        # dropout draws the same again, if there is any
        drawn = layer.training and layer.dropout.p > 0
        changed = checkpoint(_feed_forward, layer, x, use_reentrant=False, preserve_rng_state=drawn)
    else:
        changed = _feed_forward(layer, x)
    output: Tensor = x + layer.dropout3(changed)
    return output


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    output: Tensor = layer.linear2(layer.dropout(layer.activation(layer.linear1(layer.norm3(x)))))
    return output


def _cross_attention(attention: Any, query: Tensor, key: Tensor, value: Tensor, pointer_tokens: int) -> Tensor:
    """`RoPEAttention.forward` of queries [N, Q, C] to keys and values [N, L, M].

    The package repeats its table of rotations for every memory, keeps that for the backward pass, and writes the
    rotated keys over the others; here the one table is broadcast.
    """
    q = attention._separate_heads(attention.q_proj(query), attention.num_heads)
    k = attention._separate_heads(attention.k_proj(key), attention.num_heads)
    v = attention._separate_heads(attention.v_proj(value), attention.num_heads)
    cells, placed = q.shape[2], k.shape[2] - pointer_tokens
    table = rotations(attention, cells, q.device)
    k = torch.cat([_rotated(k[:, :, :placed].unflatten(2, (-1, cells)), table).flatten(2, 3), k[:, :, placed:]], 2)
    dropout = attention.dropout_p if attention.training else 0.0
    attended = F.scaled_dot_product_attention(_rotated(q, table), k, v, dropout_p=dropout)
    output: Tensor = attention.out_proj(attention._recombine_heads(attended))
    return output


def rotations(attention: Any, cells: int, device: torch.device) -> Tensor:
    """The rotation of each cell, complex [Q, head width / 2], made once (at another size than the network's, anew)."""
    table: Tensor = attention.freqs_cis
    if len(table) != cells:
        side = round(cells**0.5)
        table = attention.compute_cis(end_x=side, end_y=side)
    if table is not attention.freqs_cis or table.device != device:
        table = attention.freqs_cis = table.to(device)
    return table


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    """Pairs of channels turned by the angles of their cell: x [..., Q, head width]."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


def rotate_(x: Tensor, table: Tensor) -> Tensor:
    """`_rotated` in place, for float32 without gradients; another precision is turned in float32 and written back."""
    if x.dtype == torch.float32:
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(table)
        return x
    return x.copy_(_rotated(x, table))
