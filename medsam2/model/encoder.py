"""The image encoder, run block by block: what `sam2`'s `ImageEncoder.forward` computes, with less work.

- Where windows do not divide the side (512 px: 32 cells in windows of 14), the package pads the tokens to 42 x 42 and
  projects the padding too. Projections see one token at a time, so that here only real tokens go through them.
- Position encodings are made for the one level and the one frame that are used.

Legend: F frames, S input side, C width of a block, H and W its grid, D its output width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medsam2.model.lean import through
from medsam2.model.speed import Speed


def encode_image(encoder: Any, frames: Tensor, speed: Speed) -> tuple[list[Tensor], Tensor]:
    """Normalised frames [F, 3, S, S] -> the three feature levels (finest first) and the position of the coarsest.

    Returns:
        [F, 256, S/4, S/4], [F, 256, S/8, S/8], [F, 256, S/16, S/16] (widths of the official sizes), and [1, 256, S/16,
        S/16].
    """
    if speed.channels_last:
        frames = frames.contiguous(memory_format=torch.channels_last)
    levels = _neck(encoder.neck, _trunk(encoder.trunk, frames, speed))
    levels = levels[: len(levels) - encoder.scalp][-3:]
    return levels, encoder.neck.position_encoding(levels[-1][:1]).to(levels[-1].dtype)


def _trunk(trunk: Any, frames: Tensor, speed: Speed) -> list[Tensor]:
    """The output of each stage, finest first, channels in front."""
    x = trunk.patch_embed(frames)
    x = x + trunk._get_pos_embed(x.shape[1:3])
    outputs = []
    lean = "image_encoder" not in speed.checkpoint | speed.compile
    for number, block in enumerate(trunk.blocks):
        x = speed.run("image_encoder", run_block, block, x, lean)
        if number in trunk.stage_ends:
            outputs.append(x.permute(0, 3, 1, 2))
    return outputs


def _neck(neck: Any, stages: list[Tensor]) -> list[Tensor]:
    """The feature pyramid: one convolution a level, the coarse levels added from the top down."""
    levels: list[Tensor] = []
    last = len(stages) - 1
    for number in range(last, -1, -1):
        level = neck.convs[last - number](stages[number])
        if number in neck.fpn_top_down_levels and levels:
            smooth = None if neck.fpn_interp_model == "nearest" else False
            above = F.interpolate(levels[0].float(), scale_factor=2.0, mode=neck.fpn_interp_model, align_corners=smooth)
            level = level + above
            if neck.fuse_type == "avg":
                level = level / 2
        levels.insert(0, level)
    return levels


def run_block(block: Any, x: Tensor, lean: bool = False) -> Tensor:
    """One Hiera block: tokens [F, H, W, C] -> [F, H', W', D].

    Args:
        lean: compute norms and activations again in the backward pass (`medsam2.model.lean`).
    """
    chain = through if lean else _chained
    window, stride = block.window_size, block.q_stride
    fits = window == 0 or not (x.shape[1] % window or x.shape[2] % window)
    inside = _windows(x, window) if window and fits else x  # one copy here, where the package's order needs no other
    qkv = chain(block.norm1, inside, block.attn.qkv)
    shortcut = x
    if block.dim != block.dim_out:
        shortcut = _pooled(chain(block.norm1, inside, block.proj), stride, lean)
    if fits:
        attended = block.attn.proj(_attend(block.attn, qkv, stride, lean))
    else:
        attended = _attend_beyond(block.attn, qkv, window, x.shape[-1], stride, lean)
    if window and fits:
        down = stride[0] if stride else 1
        size = (x.shape[1] // down, x.shape[2] // down)
        attended = _joined(attended, size)
        shortcut = shortcut if shortcut is x else _joined(shortcut, size)
    x = shortcut + block.drop_path(attended)
    hidden = chain(block.norm2, x, block.mlp.layers[0])
    output: Tensor = x + block.drop_path(chain(block.mlp.act, hidden, block.mlp.layers[1]))
    return output


def _chained(cheap: Any, x: Tensor, costly: Any) -> Tensor:
    output: Tensor = costly(cheap(x))
    return output


def _attend_beyond(
    attention: Any, qkv: Tensor, window: int, width: int, stride: tuple[int, int] | None, lean: bool
) -> Tensor:
    """Attention in windows that reach beyond the grid, and the projection: qkv [F, H, W, 3 D] -> [F, H', W', D].

    What is beyond is a zero token of `width`, as in the package: its key and value, the projection's bias, are
    attended to.
    """
    height, across = qkv.shape[1:3]
    down = stride[0] if stride else 1
    rows, columns = -height % window, -across % window
    qkv = _extended(qkv, attention.qkv(qkv.new_zeros(1, 1, 1, width)), rows, columns)
    attended = _attend(attention, _windows(qkv, window), stride, lean)
    attended = _joined(attended, ((height + rows) // down, (across + columns) // down))
    output: Tensor = attention.proj(attended[:, : height // down, : across // down])
    return output


def _attend(attention: Any, qkv: Tensor, stride: tuple[int, int] | None, lean: bool) -> Tensor:
    """Every token to every other: [B, H, W, 3 D] -> [B, H', W', D]."""
    q, k, v = qkv.unflatten(3, (3, attention.num_heads, -1)).unbind(3)
    if stride:
        q = _pooled(q.flatten(3), stride, lean).unflatten(3, (attention.num_heads, -1))
    q_heads, k_heads, v_heads = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    attended = F.scaled_dot_product_attention(q_heads, k_heads, v_heads)
    return attended.transpose(1, 2).reshape(*q.shape[:3], -1)


def _windows(x: Tensor, side: int) -> Tensor:
    """[F, H, W, C] -> [F * windows, side, side, C]."""
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return x.transpose(2, 3).flatten(0, 2)


def _joined(windows: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `_windows`: [F * windows, side, side, C] -> [F, H, W, C]."""
    side = windows.shape[1]
    x = windows.unflatten(0, (-1, size[0] // side, size[1] // side))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _extended(x: Tensor, value: Tensor, rows: int, columns: int) -> Tensor:
    """x [F, H, W, C] with `value` [1, 1, 1, C] in rows below and columns on the right."""
    value = value.to(x.dtype)
    x = torch.cat([x, value.expand(x.shape[0], x.shape[1], columns, -1)], 2)
    return torch.cat([x, value.expand(x.shape[0], rows, x.shape[2], -1)], 1)


def _pooled(x: Tensor, stride: tuple[int, int] | None, lean: bool) -> Tensor:
    """The largest of each `stride` of the tokens [F, H, W, C]; lean: pooled again for the backward pass.

    Pooling keeps indices and a copy, more than the tokens, and costs little.
    """
    if not stride:
        return x
    if lean and torch.is_grad_enabled():
        output: Tensor = checkpoint(_largest, x, stride, use_reentrant=False, preserve_rng_state=False)
        return output
    return _largest(x, stride)


def _largest(x: Tensor, stride: tuple[int, int]) -> Tensor:
    return F.max_pool2d(x.permute(0, 3, 1, 2), stride, stride).permute(0, 2, 3, 1)
