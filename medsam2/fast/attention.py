"""Compute what `sam2`'s `MemoryAttention.forward` computes, sharing work among the objects of a clip.

In training the objects of a clip share one memory bank: use `attend_memory`, which supports gradients. In prediction
each object has a separate bank, and banks may hold different numbers of memories: `attend_separate_banks` runs
projections, self-attention and feed-forward layers once for all objects, and cross-attention once per number of tokens.

Legend: U frames, N objects on them, n of them with the same number of memories, E memories and P pointers that an
object attends to, C hidden width, M memory width, h and w = S / 16, Q = h * w, L = E * Q + pointer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medsam2.fast.execution import SpeedSettings, can_use_onednn, linear_onednn
from medsam2.model.memory_bank import Attended

if TYPE_CHECKING:
    from medsam2.model.tracker import Features, Tracker

MAX_ATTENTION_WEIGHTS = 1 << 21
"""Attention weights computed at a time: 8 MiB in float32, a block that the allocator can reuse for every step."""


def memory_tokens(sam: Any, attended: Sequence[Attended], embed: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return memory tokens, the same tokens with encodings of place and time, and the number of pointer tokens.

    Args:
        attended: one entry for all objects together, or one per object (of one-object memories); all entries have the
            same number of memories and of pointers.
        embed: [N, C, h, w]; the tokens get its dtype.

    Returns:
        values [N, L, M]; keys [N, L, M]; the number of tokens at the end that come from pointers.
    """
    entries = zip(*(one.spatial for one in attended), strict=True)
    stored = torch.stack([torch.cat([memory.features for _, memory in entry]) for entry in entries], 1).to(embed.dtype)
    tokens = [stored.flatten(3).transpose(2, 3).flatten(1, 2)]
    grid = sam.memory_encoder.position_encoding(stored[:1, 0]).to(embed.dtype).flatten(2).transpose(1, 2)
    table = sam.maskmem_tpos_enc.flatten(1)
    rows = _share_equal_rows([[row for row, _ in one.spatial] for one in attended])
    # Rows are read one by one: an index tensor would have to be copied to the device, which synchronises.
    times = [torch.stack([table[0] * 0 if row is None else table[row] for row in some]) for some in rows]
    places = [(grid[:, None] + torch.stack(times)[:, :, None]).flatten(1, 2)]
    if attended[0].pointers:
        pointers = zip(*(one.pointers for one in attended), strict=True)
        stored = torch.stack([torch.cat([pointer for _, pointer in some]) for some in pointers], 1).to(embed.dtype)
        tokens.append(stored.flatten(1).unflatten(1, (-1, sam.mem_dim)))
        places.append(_pointer_encodings(sam, attended, embed).repeat_interleave(sam.hidden_dim // sam.mem_dim, 1))
    values, count = torch.cat(tokens, 1), max(map(len, places))
    keys = values + torch.cat([place.expand(count, -1, -1) for place in places], 1)
    return values, keys, values.shape[1] - tokens[0].shape[1]


def _pointer_encodings(sam: Any, attended: Sequence[Attended], like: Tensor) -> Tensor:
    """Return the temporal encodings of the pointers, [n or 1, P, M]."""
    from sam2.modeling.sam2_utils import get_1d_sine_pe

    if not sam.add_tpos_enc_to_obj_ptrs:  # version 2.0
        return like.new_zeros(1, len(attended[0].pointers), sam.mem_dim)
    ages = _share_equal_rows([[distance / one.pointer_span for distance, _ in one.pointers] for one in attended])
    # Each age is filled in on the device, since a copy from the CPU would synchronise.
    times = torch.stack([torch.cat([like.new_full((1,), age, dtype=torch.float32) for age in some]) for some in ages])
    encodings: Tensor = sam.obj_ptr_tpos_proj(get_1d_sine_pe(times, dim=sam.hidden_dim).to(like.dtype))
    return encodings


def _share_equal_rows(rows: list[Any]) -> list[Any]:
    """Return one row to broadcast where the rows of all objects are equal, which is the usual case."""
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
    """Return the features conditioned on memory, [N, C, h, w].

    The objects of a frame have the same features until the first cross-attention, so that the first self-attention
    runs once per frame instead of once per object.

    Args:
        frames: [U, C, h, w]. owner: int64 [N], the frame of each object; None where each object has a frame (U = N).
        position: [1, C, h, w]. values, keys, pointer_tokens: see `memory_tokens`.
    """
    positions = position.flatten(2).transpose(1, 2)
    x = frames.flatten(2).transpose(1, 2) + 0.1 * positions
    recompute = "memory_attention" not in speed.checkpoint + speed.compile
    for number, layer in enumerate(attention.layers):
        rows = owner if number == 0 else None
        x = speed.run("memory_attention", run_layer, layer, x, rows, positions, keys, values, pointer_tokens, recompute)
    output: Tensor = attention.norm(x).transpose(1, 2).unflatten(2, frames.shape[-2:])
    return output


def run_layer(
    layer: Any,
    x: Tensor,
    owner: Tensor | None,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    pointer_tokens: int,
    recompute_ffn: bool = False,
) -> Tensor:
    """Run one layer: self-attention [U, Q, C], then cross-attention to memory and feed-forward [N, Q, C].

    Args:
        recompute_ffn: checkpoint the feed-forward layer (2,048 activations per token; costs about 1 % of step time).
    """
    x = layer._forward_sa(x, positions)
    if owner is not None:
        x = x.expand(len(owner), -1, -1) if x.shape[0] == 1 else x[owner]
    attended = _cross_attention(layer.cross_attn_image, layer.norm2(x), keys, values, pointer_tokens)
    x = x + layer.dropout2(attended)
    if recompute_ffn and torch.is_grad_enabled():
        # With dropout, the recomputation must draw the same mask.
        has_dropout = layer.training and layer.dropout.p > 0
        residual = checkpoint(_feed_forward, layer, x, use_reentrant=False, preserve_rng_state=has_dropout)
    else:
        residual = _feed_forward(layer, x)
    output: Tensor = x + layer.dropout3(residual)
    return output


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    output: Tensor = layer.linear2(layer.dropout(layer.activation(layer.linear1(layer.norm3(x)))))
    return output


def _cross_attention(attention: Any, query: Tensor, key: Tensor, value: Tensor, pointer_tokens: int) -> Tensor:
    """Compute `RoPEAttention.forward` for queries [N, Q, C], keys and values [N, L, M].

    The package repeats the rotary table for every memory, saves the copies for the backward pass, and overwrites keys
    in place; here one table is broadcast.
    """
    q = attention._separate_heads(attention.q_proj(query), attention.num_heads)
    k = attention._separate_heads(attention.k_proj(key), attention.num_heads)
    v = attention._separate_heads(attention.v_proj(value), attention.num_heads)
    cells, spatial = q.shape[2], k.shape[2] - pointer_tokens
    table = rotary_table(attention, cells, q.device)
    k = torch.cat([_rotate(k[:, :, :spatial].unflatten(2, (-1, cells)), table).flatten(2, 3), k[:, :, spatial:]], 2)
    dropout = attention.dropout_p if attention.training else 0.0
    attended = F.scaled_dot_product_attention(_rotate(q, table), k, v, dropout_p=dropout)
    output: Tensor = attention.out_proj(attention._recombine_heads(attended))
    return output


def rotary_table(attention: Any, cells: int, device: torch.device) -> Tensor:
    """Return the rotation of each cell, complex [Q, head width / 2]; cached in `attention`, per size and device."""
    table: Tensor = attention.freqs_cis
    if len(table) != cells:
        side = round(cells**0.5)
        table = attention.compute_cis(end_x=side, end_y=side)
    if table is not attention.freqs_cis or table.device != device:
        table = attention.freqs_cis = table.to(device)
    return table


def _rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs of channels of x [..., Q, head width] by the angles of their cell."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


def rotate_(x: Tensor, table: Tensor) -> Tensor:
    """Rotate as `_rotate` does, but in place and without gradients; other dtypes are rotated in float32."""
    if x.dtype == torch.float32:
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(table)
        return x
    return x.copy_(_rotate(x, table))


# Prediction: a separate memory bank for each object.


@dataclass(frozen=True, eq=False)
class BankTokens:
    """Memory tokens of consecutive objects that attend to the same number of memories.

    Attributes:
        rows: which of the N objects. values, keys, pointer_tokens: see `memory_tokens`, for these n objects.
    """

    rows: slice
    values: Tensor
    keys: Tensor
    pointer_tokens: int


def attend_separate_banks(tracker: Tracker, features: Features, attended: Sequence[Attended]) -> Tensor:
    """Return one frame's features conditioned on the memories of each of N objects, [N, C, h, w].

    Args:
        features: of the frame; all rows are equal. attended: one entry per object, of one-object memories.
    """
    attention = tracker.sam.memory_attention
    order = sorted(range(len(attended)), key=lambda i: _memory_counts(attended[i]))
    groups = _group_tokens(tracker, [attended[i] for i in order], features)
    frame = features.embed[:1]
    positions = features.position.flatten(2).transpose(1, 2)
    x = frame.flatten(2).transpose(1, 2) + 0.1 * positions
    for layer in attention.layers:
        x = tracker.speed.run("memory_attention", run_layer_separately, layer, x, len(attended), positions, groups)
    output: Tensor = attention.norm(x).transpose(1, 2).unflatten(2, frame.shape[-2:])
    if order != sorted(order):
        output = output[torch.tensor(order).argsort().to(output.device)]
    return output


def _memory_counts(attended: Attended) -> tuple[int, int]:
    return len(attended.spatial), len(attended.pointers)


def _group_tokens(tracker: Tracker, attended: list[Attended], features: Features) -> list[BankTokens]:
    """Return the tokens of each group of consecutive objects with equal numbers of memories and pointers."""
    groups, start = [], 0
    for _, members in groupby(attended, key=_memory_counts):
        group = list(members)
        rows = slice(start, start + len(group))
        groups.append(BankTokens(rows, *memory_tokens(tracker.sam, group, features.embed)))
        start = rows.stop
    return groups


def run_layer_separately(layer: Any, x: Tensor, count: int, positions: Tensor, groups: list[BankTokens]) -> Tensor:
    """Run one layer, [1 or N, Q, C] -> [N, Q, C]; before the first cross-attention all objects share one row."""
    x = layer._forward_sa(x, positions)
    x = x + _cross_attention_separately(layer.cross_attn_image, layer.norm2(x), count, groups)
    # A CPU runs object by object, since the hidden tokens of one object (8 MiB) fit into its cache.
    pieces = x.split(1) if x.device.type == "cpu" and not torch.compiler.is_compiling() else (x,)
    residuals = [layer.linear2(layer.activation(layer.linear1(layer.norm3(piece)))) for piece in pieces]
    return x + (torch.cat(residuals) if len(residuals) > 1 else residuals[0])


def _cross_attention_separately(attention: Any, query: Tensor, count: int, groups: list[BankTokens]) -> Tensor:
    """Compute `RoPEAttention.forward` of each object's queries [1 or N, Q, C] to the object's tokens, [N, Q, C].

    The attention weights of a query sum to 1 and the value projection is affine, so that with one head the projection
    can be applied to the weighted mean: [Q, M] instead of [L, C], and the mean itself has a quarter of the width.
    """
    q = attention.q_proj(query).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    q = rotate_(q.contiguous(), rotary_table(attention, q.shape[2], q.device)).expand(count, -1, -1, -1)
    project_last = attention.num_heads == 1 and not torch.is_grad_enabled() and can_use_onednn(attention.out_proj, q)
    attended = []
    for group in groups:
        keys = attention.k_proj(group.keys)
        keys = keys.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2).contiguous()
        spatial = keys.shape[2] - group.pointer_tokens
        table = rotary_table(attention, q.shape[2], q.device)
        rotate_(keys[:, :, :spatial].unflatten(2, (-1, q.shape[2])), table)
        if project_last:
            attended.append(attention.v_proj(_weighted_mean(q[group.rows, 0], keys[:, 0], group.values.to(q.dtype))))
        else:
            values = attention.v_proj(group.values).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            heads = F.scaled_dot_product_attention(q[group.rows], keys, values)
            attended.append(heads.transpose(1, 2).flatten(2))
    output: Tensor = attention.out_proj(torch.cat(attended) if len(attended) > 1 else attended[0])
    return output


def _weighted_mean(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the mean of values [n, L, M] weighted by softmax(query [n, Q, C] x keys [n, L, C]), [n, Q, M].

    PyTorch's fused attention on a CPU needs values as wide as keys; therefore the weights are materialised here, for
    a limited number of queries at a time.
    """
    query = query * query.shape[-1] ** -0.5
    step = max(MAX_ATTENTION_WEIGHTS // keys.shape[1], 1)
    means = []
    for i in range(len(query)):
        across = values[i].t().contiguous()
        for some in query[i].split(step):
            scores = linear_onednn(some, keys[i])
            torch.softmax(scores, -1, out=scores)
            means.append(linear_onednn(scores, across))
    return torch.cat(means).unflatten(0, (len(query), -1))
