"""Memory attention in prediction: each object recalls what its own bank holds, all objects of a frame in one batch.

It computes what `Tracker.condition` computes for objects that share one bank (tests hold both against each other).
Unlike there, objects may attend to different numbers of memories: projections, self-attention and feed-forward parts
run once for all, only the attention itself runs once for each number of tokens.

Legend: N objects of one frame, E memories an object attends to, P pointers, C hidden width, M memory width, Q = h * w
cells, L = E * Q + pointer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medsam2.model.attention import rotate_, rotations
from medsam2.model.memory import Attended
from medsam2.model.onednn_linear import can_use_onednn, product

if TYPE_CHECKING:
    from medsam2.model.tracker import Features, Tracker

MAX_ATTENTION_WEIGHTS = 1 << 21
"""Attention weights that are written out at a time: 8 MiB, which the allocator hands out again and again."""


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
    return [_tokens(tracker, attended[a:b], slice(a, b), features) for a, b in zip(starts, ends, strict=True)]


def _tokens(tracker: Tracker, attended: list[Attended], rows: slice, features: Features) -> Remembered:
    sam, embed = tracker.sam, features.embed
    count, (entries, pointers) = len(attended), _count(attended[0])
    stored = torch.cat([memory.features for one in attended for _, memory in one.spatial]).to(embed.dtype)
    values = stored.flatten(2).transpose(1, 2)  # [n * E, Q, M]
    grid = sam.memory_encoder.position_encoding(stored[:1]).to(embed.dtype).flatten(2).transpose(1, 2)
    times = [[row for row, _ in one.spatial] for one in attended]
    if times.count(times[0]) == count:  # the usual case: one table for all objects
        times = times[:1]
    place = (grid[None] + _times(sam, times)).expand(count, -1, -1, -1)
    values = values.unflatten(0, (count, entries))
    keys = (values + place).flatten(1, 2)
    values = values.flatten(1, 2)
    if not pointers:
        return Remembered(rows, values, keys, 0)
    pieces = sam.hidden_dim // sam.mem_dim
    tokens = torch.cat([pointer for one in attended for _, pointer in one.pointers]).to(embed.dtype)
    tokens = tokens.reshape(count, pointers * pieces, sam.mem_dim)
    ages = _ages(sam, attended, tokens).repeat_interleave(pieces, 1)
    return Remembered(rows, torch.cat([values, tokens], 1), torch.cat([keys, tokens + ages], 1), pointers * pieces)


def _times(sam: Any, rows: list[list[int | None]]) -> Tensor:
    """Temporal encodings [n, E, 1, M]; zero where the policy wants none."""
    table = sam.maskmem_tpos_enc.flatten(1)
    index = torch.tensor([[-1 if row is None else row for row in one] for one in rows], device=table.device)
    found: Tensor = table[index] if all(row is not None for one in rows for row in one) else table[index] * 0
    return found[:, :, None]


def _ages(sam: Any, attended: list[Attended], like: Tensor) -> Tensor:
    """Temporal encodings of the pointers: [n or 1, P, M]."""
    from sam2.modeling.sam2_utils import get_1d_sine_pe

    distances = [[distance for distance, _ in one.pointers] for one in attended]
    if distances.count(distances[0]) == len(distances):
        distances = distances[:1]
    if not sam.add_tpos_enc_to_obj_ptrs:
        return like.new_zeros(1, len(distances[0]), sam.mem_dim)
    spans = torch.tensor([[one.pointer_span] for one in attended[: len(distances)]], dtype=torch.float32)
    place = (torch.tensor(distances, dtype=torch.float32) / spans).to(like.device, non_blocking=True)
    found: Tensor = sam.obj_ptr_tpos_proj(get_1d_sine_pe(place.flatten(), dim=sam.hidden_dim).to(like.dtype))
    return found.unflatten(0, place.shape)


def recall_layer(layer: Any, x: Tensor, count: int, here: Tensor, parts: list[Remembered]) -> Tensor:
    """One layer: [1 or N, Q, C] -> [N, Q, C]. Until the first memory is seen, the objects' features are the same."""
    x = layer._forward_sa(x, here)
    x = x + _cross_attention(layer.cross_attn_image, layer.norm2(x), count, parts)
    # object by object on a CPU, where the hidden tokens of one (8 MiB) still lie in its cache
    pieces = x.split(1) if x.device.type == "cpu" and not torch.compiler.is_compiling() else (x,)
    hidden = [layer.linear2(layer.activation(layer.linear1(layer.norm3(piece)))) for piece in pieces]
    return x + (torch.cat(hidden) if len(hidden) > 1 else hidden[0])


def _cross_attention(attention: Any, query: Tensor, count: int, parts: list[Remembered]) -> Tensor:
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
