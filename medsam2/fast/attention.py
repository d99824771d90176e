"""The memory attention: what `sam2`'s `MemoryAttention.forward` computes, with work shared by the objects of a clip.

`attend_memory` is for objects that share one bank, with gradients (training). In prediction each object has its own
bank, and they may hold different numbers of memories: `recall` runs projections, self-attention and feed-forward parts
once for all, and only the attention itself once for each number of tokens (tests hold both against each other).

Legend: U frames, N objects on them, n of them with equally many memories, E memories and P pointers that an object
attends to, C hidden width, M memory width, h and w = S / 16, Q = h * w, L = E * Q + pointer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medsam2.fast.execution import SpeedSettings, can_use_onednn, product
from medsam2.model.memory_bank import Attended

if TYPE_CHECKING:
    from medsam2.model.tracker import Features, Tracker

MAX_ATTENTION_WEIGHTS = 1 << 21
"""Attention weights that are written out at a time: 8 MiB, which the allocator hands out again and again."""


def memory_tokens(sam: Any, attended: Sequence[Attended], embed: Tensor) -> tuple[Tensor, Tensor, int]:
    """What N objects attend to, as tokens [N, L, M]; the same with place and time added; how many are pointers.

    Args:
        attended: of all objects together, or of each (of one-object memories); equally many of each kind.
        embed: [N, C, h, w]; its type is that of the tokens.
    """
    entries = zip(*(one.spatial for one in attended), strict=True)
    stored = torch.stack([torch.cat([memory.features for _, memory in entry]) for entry in entries], 1).to(embed.dtype)
    tokens = [stored.flatten(3).transpose(2, 3).flatten(1, 2)]
    grid = sam.memory_encoder.position_encoding(stored[:1, 0]).to(embed.dtype).flatten(2).transpose(1, 2)
    table = sam.maskmem_tpos_enc.flatten(1)
    rows = _once([[row for row, _ in one.spatial] for one in attended])
    # rows are taken one by one: a table of indices would be copied to the device and waited for
    times = [torch.stack([table[0] * 0 if row is None else table[row] for row in some]) for some in rows]
    places = [(grid[:, None] + torch.stack(times)[:, :, None]).flatten(1, 2)]
    if attended[0].pointers:
        pointers = zip(*(one.pointers for one in attended), strict=True)
        stored = torch.stack([torch.cat([pointer for _, pointer in some]) for some in pointers], 1).to(embed.dtype)
        tokens.append(stored.flatten(1).unflatten(1, (-1, sam.mem_dim)))
        places.append(_ages(sam, attended, embed).repeat_interleave(sam.hidden_dim // sam.mem_dim, 1))
    values, count = torch.cat(tokens, 1), max(map(len, places))
    keys = values + torch.cat([place.expand(count, -1, -1) for place in places], 1)
    return values, keys, values.shape[1] - tokens[0].shape[1]


def _ages(sam: Any, attended: Sequence[Attended], like: Tensor) -> Tensor:
    """Temporal encodings of the pointers: [n or 1, P, M]."""
    from sam2.modeling.sam2_utils import get_1d_sine_pe

    if not sam.add_tpos_enc_to_obj_ptrs:  # version 2.0
        return like.new_zeros(1, len(attended[0].pointers), sam.mem_dim)
    ages = _once([[distance / one.pointer_span for distance, _ in one.pointers] for one in attended])
    # each age is filled in on the device, for the same reason
    place = torch.stack([torch.cat([like.new_full((1,), age, dtype=torch.float32) for age in some]) for some in ages])
    encodings: Tensor = sam.obj_ptr_tpos_proj(get_1d_sine_pe(place, dim=sam.hidden_dim).to(like.dtype))
    return encodings


def _once(rows: list[Any]) -> list[Any]:
    """The usual case is one row for all objects."""
    return rows[:1] if rows.count(rows[0]) == len(rows) else rows


def attend_memory(
    attention: Any,
    frames: Tensor,
    owner: Tensor | None,
    position: Tensor,
    values: Tensor,
    keys: Tensor,
    pointer_tokens: int,
    speed: SpeedSettings,
) -> Tensor:
    """Features conditioned on memory: [N, C, h, w].

    Args:
        frames: [U, C, h, w]. owner: int64 [N], the frame of each object; None where U = N, one for each.
        position: [1, C, h, w]. values, keys, pointer_tokens: see `memory_tokens`.

    Until the first layer has looked at the memory, objects of one frame have the same features: its self-attention
    runs once a frame.
    """
    here = position.flatten(2).transpose(1, 2)
    x = frames.flatten(2).transpose(1, 2) + 0.1 * here
    lean = "memory_attention" not in speed.checkpoint + speed.compile
    for number, layer in enumerate(attention.layers):
        index = owner if number == 0 else None
        x = speed.run("memory_attention", run_layer, layer, x, index, here, keys, values, pointer_tokens, lean)
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


# In prediction


@dataclass(frozen=True, eq=False)
class Remembered:
    """Tokens of consecutive objects that attend to as many memories each.

    Attributes:
        rows: which of the N objects. values: [n, L, M]. keys: [n, L, M], the same with place and time added.
        pointer_tokens: so many at the end have no place in the image.
    """

    rows: slice
    values: Tensor
    keys: Tensor
    pointer_tokens: int


def recall(tracker: Tracker, features: Features, attended: Sequence[Attended]) -> Tensor:
    """Features of one frame conditioned on what each of N objects attends to: [N, C, h, w].

    Args:
        features: of the frame (one row, or the same for each object). attended: one an object, of one-object memories.
    """
    attention = tracker.sam.memory_attention
    order = sorted(range(len(attended)), key=lambda i: _count(attended[i]))
    parts = _remembered(tracker, [attended[i] for i in order], features)
    frame = features.embed[:1]
    here = features.position.flatten(2).transpose(1, 2)
    x = frame.flatten(2).transpose(1, 2) + 0.1 * here
    for layer in attention.layers:
        x = tracker.speed.run("memory_attention", recall_layer, layer, x, len(attended), here, parts)
    output: Tensor = attention.norm(x).transpose(1, 2).unflatten(2, frame.shape[-2:])
    if order != sorted(order):
        output = output[torch.tensor(order).argsort().to(output.device)]
    return output


def _count(attended: Attended) -> tuple[int, int]:
    return len(attended.spatial), len(attended.pointers)


def _remembered(tracker: Tracker, attended: list[Attended], features: Features) -> list[Remembered]:
    """The tokens of each run of objects with equal counts."""
    starts = [i for i in range(len(attended)) if i == 0 or _count(attended[i]) != _count(attended[i - 1])]
    ends = [*starts[1:], len(attended)]
    return [
        Remembered(slice(a, b), *memory_tokens(tracker.sam, attended[a:b], features.embed))
        for a, b in zip(starts, ends, strict=True)
    ]


def recall_layer(layer: Any, x: Tensor, count: int, here: Tensor, parts: list[Remembered]) -> Tensor:
    """One layer: [1 or N, Q, C] -> [N, Q, C]. Until the first memory is seen, the objects' features are the same."""
    x = layer._forward_sa(x, here)
    x = x + _recall_attention(layer.cross_attn_image, layer.norm2(x), count, parts)
    # object by object on a CPU, where the hidden tokens of one (8 MiB) still lie in its cache
    pieces = x.split(1) if x.device.type == "cpu" and not torch.compiler.is_compiling() else (x,)
    hidden = [layer.linear2(layer.activation(layer.linear1(layer.norm3(piece)))) for piece in pieces]
    return x + (torch.cat(hidden) if len(hidden) > 1 else hidden[0])


def _recall_attention(attention: Any, query: Tensor, count: int, parts: list[Remembered]) -> Tensor:
    """`RoPEAttention.forward` of each object's queries [1 or N, Q, C] to its own tokens: [N, Q, C].

    Weights of a query add up to 1 and the projection of values is affine: with one head it may as well be applied to
    the weighted mean, which is [Q, M] instead of [L, C], and the mean is taken at a quarter of the width.
    """
    q = attention.q_proj(query).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    q = rotate_(q.contiguous(), rotations(attention, q.shape[2], q.device)).expand(count, -1, -1, -1)
    late = attention.num_heads == 1 and not torch.is_grad_enabled() and can_use_onednn(attention.out_proj, q)
    found = []
    for part in parts:
        keys = attention.k_proj(part.keys)
        keys = keys.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2).contiguous()
        placed = keys.shape[2] - part.pointer_tokens
        table = rotations(attention, q.shape[2], q.device)
        rotate_(keys[:, :, :placed].unflatten(2, (-1, q.shape[2])), table)
        if late:
            found.append(attention.v_proj(_weighted(q[part.rows, 0], keys[:, 0], part.values.to(q.dtype))))
        else:
            values = attention.v_proj(part.values).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            attended = F.scaled_dot_product_attention(q[part.rows], keys, values)
            found.append(attended.transpose(1, 2).flatten(2))
    output: Tensor = attention.out_proj(torch.cat(found) if len(found) > 1 else found[0])
    return output


def _weighted(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Mean of values [n, L, M] weighted by the softmax of query [n, Q, C] x keys [n, L, C]: [n, Q, M].

    PyTorch's fused attention on a CPU needs values as wide as keys; so the weights are written out, some queries at a
    time.
    """
    query = query * query.shape[-1] ** -0.5
    step = max(MAX_ATTENTION_WEIGHTS // keys.shape[1], 1)
    means = []
    for i in range(len(query)):
        across = values[i].t().contiguous()
        for some in query[i].split(step):
            scores = product(some, keys[i])
            torch.softmax(scores, -1, out=scores)
            means.append(product(scores, across))
    return torch.cat(means).unflatten(0, (len(query), -1))
