"""The image encoder, run block by block: what `sam2`'s `ImageEncoder.forward` computes, with less work.

- Where windows do not divide the side (512 px: 32 cells in windows of 14), the package pads the tokens to 42 x 42 and
  projects the padding too. Projections see one token at a time, so that here only real tokens go through them.
- The two finer levels of the pyramid are only seen through another projection: both are applied as one matrix.
- Position encodings are made for the one level and the one frame that are used.

Legend: F frames, S input side, C width of a block, H and W its grid, D its output width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medsam2.model.recompute import keep_input, recompute_input
from medsam2.model.speed import Speed
from medsam2.model.windows import joined, joined_within, pooled, windows, windows_beyond


def encode_image(encoder: Any, frames: Tensor, speed: Speed) -> tuple[list[Tensor], Tensor, Tensor]:
    """Normalised frames [F, 3, S, S] -> the trunk's stages, the coarse features, and their position.

    Returns:
        the stages, finest first: [F, C, H, W] each; [F, 256, S/16, S/16] (width of the official sizes); and [1, 256,
        S/16, S/16].
    """
    stages = _trunk(encoder.trunk, frames, speed)
    coarse = _coarse(encoder.neck, stages, len(stages) - encoder.scalp - 1)
    return stages, coarse, encoder.neck.position_encoding(coarse[:1]).to(coarse.dtype)


def project_fine(encoder: Any, stages: list[Tensor], projections: tuple[nn.Module, nn.Module]) -> tuple[Tensor, Tensor]:
    """What the mask decoder sees of the two finer levels: [F, 32, S/4, S/4] and [F, 64, S/8, S/8].

    Args:
        projections: the decoder's 1 x 1 convolutions of the levels. The neck's come before, to 256 channels that
            nobody else looks at: the product of both matrices is applied at once.
    """
    first = len(stages) - encoder.scalp - 3
    fine, middle = (
        _composed(_lateral(encoder.neck, first + place), projection, stages[first + place])
        for place, projection in enumerate(projections)
    )
    return fine, middle


def _trunk(trunk: Any, frames: Tensor, speed: Speed) -> list[Tensor]:
    """The output of each stage, finest first, channels in front."""
    x = trunk.patch_embed(frames)
    x = x + trunk._get_pos_embed(x.shape[1:3])
    outputs = []
    lean = "image_encoder" not in speed.checkpoint | speed.compile
    for number, block in enumerate(trunk.blocks):
        x = speed.run("image_encoder", run_block, block, x, lean, lean and number <= trunk.stage_ends[1])
        if number in trunk.stage_ends:
            outputs.append(x.permute(0, 3, 1, 2))
    return outputs


def _coarse(neck: Any, stages: list[Tensor], level: int) -> Tensor:
    """The feature pyramid down to `level`: one convolution a level, the coarser ones added from the top down."""
    found: Tensor | None = None
    for number in range(len(stages) - 1, level - 1, -1):
        lateral = _pointwise(_lateral(neck, number), stages[number])
        if number in neck.fpn_top_down_levels and found is not None:
            smooth = None if neck.fpn_interp_model == "nearest" else False
            above = F.interpolate(found.float(), scale_factor=2.0, mode=neck.fpn_interp_model, align_corners=smooth)
            lateral = lateral + above
            if neck.fuse_type == "avg":
                lateral = lateral / 2
        found = lateral
    assert found is not None
    return found


def _lateral(neck: Any, level: int) -> nn.Module:
    """The neck's 1 x 1 convolution of a level."""
    convolution: nn.Module = neck.convs[len(neck.convs) - 1 - level].conv
    return convolution


def _pointwise(convolution: nn.Module, x: Tensor) -> Tensor:
    """A 1 x 1 convolution of a map whose channels lie together, as a matrix product: several times faster on a CPU."""
    if type(convolution) is not nn.Conv2d:  # an adapter's
        output: Tensor = convolution(x)
        return output
    return F.linear(x.permute(0, 2, 3, 1), convolution.weight.flatten(1), convolution.bias).permute(0, 3, 1, 2)


def _composed(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    """`second(first(x))` of two 1 x 1 convolutions: [F, C, H, W] -> [F, D, H, W], contiguous."""
    if type(first) is not nn.Conv2d or type(second) is not nn.Conv2d:
        return _pointwise(second, _pointwise(first, x)).contiguous()
    assert first.bias is not None and second.bias is not None
    # the product is written as a sum, which autocast leaves in full precision
    outer, inner = second.weight.flatten(1), first.weight.flatten(1)
    weight = (outer[:, :, None] * inner).sum(1)
    bias = (outer * first.bias).sum(1) + second.bias
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2).contiguous()


def run_block(block: Any, x: Tensor, lean: bool = False, leanest: bool = False) -> Tensor:
    """One Hiera block: tokens [F, H, W, C] -> [F, H', W', D].

    Args:
        lean: compute norms and activations again in the backward pass (`medsam2.model.recompute`).
        leanest: the hidden layer too. Pays in the first stages, whose tokens are many and narrow: to keep the layer
            costs C numbers a token, to compute it again C x C products.
    """
    project = recompute_input if lean else keep_input
    window, stride = block.window_size, block.q_stride
    fits = window == 0 or not (x.shape[1] % window or x.shape[2] % window)
    inside = windows(x, window) if window and fits else x  # one copy here, where the package's order needs no other
    qkv = project(block.norm1, inside, block.attn.qkv)
    shortcut = x
    if block.dim != block.dim_out:
        shortcut = pooled(project(block.norm1, inside, block.proj), stride)
    if fits:
        attended = block.attn.proj(_attend(block.attn, qkv, stride))
    else:
        attended = _attend_beyond(block.attn, qkv, window, x.shape[-1], stride)
    if window and fits:
        down = stride[0] if stride else 1
        size = (x.shape[1] // down, x.shape[2] // down)
        attended = joined(attended, size)
        shortcut = shortcut if shortcut is x else joined(shortcut, size)
    x = shortcut + block.drop_path(attended)
    if leanest and torch.is_grad_enabled():
        changed = checkpoint(_feed_forward, block, x, keep_input, use_reentrant=False, preserve_rng_state=False)
    else:
        changed = _feed_forward(block, x, project)
    output: Tensor = x + block.drop_path(changed)
    return output


def _feed_forward(block: Any, x: Tensor, project: Callable[..., Tensor]) -> Tensor:
    hidden = project(block.norm2, x, block.mlp.layers[0])
    return project(block.mlp.act, hidden, block.mlp.layers[1])


def _attend_beyond(attention: Any, qkv: Tensor, window: int, width: int, stride: tuple[int, int] | None) -> Tensor:
    """Attention in windows that reach beyond the grid, and the projection: qkv [F, H, W, 3 D] -> [F, H', W', D].

    What is beyond is a zero token of `width`, as in the package: its key and value, the projection's bias, are
    attended to.
    """
    down = stride[0] if stride else 1
    size = (qkv.shape[1] // down, qkv.shape[2] // down)
    edge = attention.qkv(qkv.new_zeros(1, width))[0]
    attended = joined_within(_attend(attention, windows_beyond(qkv, edge, window), stride), size)
    output: Tensor = attention.proj(attended)
    return output


def _attend(attention: Any, qkv: Tensor, stride: tuple[int, int] | None) -> Tensor:
    """Every token to every other: [B, H, W, 3 D] -> [B, H', W', D]."""
    q, k, v = qkv.unflatten(3, (3, attention.num_heads, -1)).unbind(3)
    if stride:
        q = pooled(q.flatten(3), stride).unflatten(3, (attention.num_heads, -1))
    q_heads, k_heads, v_heads = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    attended = F.scaled_dot_product_attention(q_heads, k_heads, v_heads)
    return attended.transpose(1, 2).reshape(*q.shape[:3], -1)
