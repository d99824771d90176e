"""Compute what `sam2`'s `ImageEncoder.forward` computes, block by block and with less work.

- Where windows do not divide the side (512 px: 32 cells in windows of 14), the package pads the tokens to 42 x 42 and
  projects the padding too. Projections act on single tokens, so that here only real tokens are projected.
- The two finer levels of the pyramid are always projected once more: both projections are applied as one matrix.
- Position encodings are computed only for the one level and the one frame that are used.

Legend: F frames, S input side, C width of a block, H and W its grid, D its output width, w side of a window, R and S
numbers of windows down and across (the last ones may extend beyond the grid).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from medsam2.fast.execution import SpeedSettings


def encode_image(encoder: Any, frames: Tensor, speed: SpeedSettings) -> tuple[list[Tensor], Tensor, Tensor]:
    """Encode normalised frames [F, 3, S, S].

    Returns:
        the outputs of the trunk's stages, finest first, [F, C, H, W] each; the coarse features [F, 256, S/16, S/16]
        (the width of the official sizes); and their position encoding [1, 256, S/16, S/16].
    """
    stages = _trunk(encoder.trunk, frames, speed)
    coarse = _coarse(encoder.neck, stages, len(stages) - encoder.scalp - 1)
    return stages, coarse, encoder.neck.position_encoding(coarse[:1]).to(coarse.dtype)


def project_fine(encoder: Any, stages: list[Tensor], projections: tuple[nn.Module, nn.Module]) -> tuple[Tensor, Tensor]:
    """Project the two finer levels for the mask decoder: [F, 32, S/4, S/4] and [F, 64, S/8, S/8].

    Args:
        projections: the decoder's 1 x 1 convolutions of both levels. They follow the neck's convolutions, whose 256
            channels nothing else uses, so that the product of both matrices is applied.
    """
    first = len(stages) - encoder.scalp - 3
    fine, middle = (
        _compose_pointwise(_lateral(encoder.neck, level), projection, stages[level])
        for level, projection in enumerate(projections, first)
    )
    return fine, middle


def _trunk(trunk: Any, frames: Tensor, speed: SpeedSettings) -> list[Tensor]:
    """Return the output of each stage, finest first, channels first."""
    x = trunk.patch_embed(frames)
    x = x + trunk._get_pos_embed(x.shape[1:3])
    outputs = []
    recompute = "image_encoder" not in speed.checkpoint + speed.compile
    for number, block in enumerate(trunk.blocks):
        x = speed.run("image_encoder", run_block, block, x, recompute, recompute and number <= trunk.stage_ends[1])
        if number in trunk.stage_ends:
            outputs.append(x.permute(0, 3, 1, 2))
    return outputs


def _coarse(neck: Any, stages: list[Tensor], level: int) -> Tensor:
    """Return the feature pyramid at `level`: one convolution per level, coarser levels added from the top down."""
    features = _pointwise(_lateral(neck, len(stages) - 1), stages[-1])
    for number in range(len(stages) - 2, level - 1, -1):
        lateral = _pointwise(_lateral(neck, number), stages[number])
        if number in neck.fpn_top_down_levels:
            lateral = lateral + F.interpolate(features.float(), scale_factor=2.0, mode="nearest")
        features = lateral
    return features


def _lateral(neck: Any, level: int) -> nn.Module:
    """Return the neck's 1 x 1 convolution of a level."""
    convolution: nn.Module = neck.convs[len(neck.convs) - 1 - level].conv
    return convolution


def _pointwise(convolution: nn.Module, x: Tensor) -> Tensor:
    """Apply a 1 x 1 convolution to a channels-last map as a matrix product: several times faster on a CPU."""
    if type(convolution) is not nn.Conv2d:  # an adapter replaced it
        output: Tensor = convolution(x)
        return output
    return F.linear(x.permute(0, 2, 3, 1), convolution.weight.flatten(1), convolution.bias).permute(0, 3, 1, 2)


def _compose_pointwise(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    """Compute `second(first(x))` of two 1 x 1 convolutions, [F, C, H, W] -> [F, D, H, W], contiguous."""
    if type(first) is not nn.Conv2d or type(second) is not nn.Conv2d:
        return _pointwise(second, _pointwise(first, x)).contiguous()
    assert first.bias is not None and second.bias is not None
    # The matrix product is written as a sum, because autocast would round a product to half precision.
    outer, inner = second.weight.flatten(1), first.weight.flatten(1)
    weight = (outer[:, :, None] * inner).sum(1)
    bias = (outer * first.bias).sum(1) + second.bias
    return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2).contiguous()


def run_block(block: Any, x: Tensor, recompute: bool = False, recompute_ffn: bool = False) -> Tensor:
    """Run one Hiera block, tokens [F, H, W, C] -> [F, H', W', D].

    Args:
        recompute: recompute norms and activations in the backward pass (`recompute_input`).
        recompute_ffn: checkpoint the whole feed-forward layer. This pays in the first stages, which have many narrow
            tokens: storing the hidden layer grows with C per token, recomputing it with C x C.
    """
    project = recompute_input if recompute else keep_input
    window, stride = block.window_size, block.q_stride
    fits = window == 0 or not (x.shape[1] % window or x.shape[2] % window)
    tokens = split_windows(x, window) if window and fits else x  # the only copy
    qkv = project(block.norm1, tokens, block.attn.qkv)
    shortcut = x
    if block.dim != block.dim_out:
        shortcut = max_pool(project(block.norm1, tokens, block.proj), stride)
    scale = stride[0] if stride else 1
    size = (x.shape[1] // scale, x.shape[2] // scale)
    if fits:
        attended = block.attn.proj(_attend(block.attn, qkv, stride))
    else:
        padding = block.attn.qkv(qkv.new_zeros(1, x.shape[-1]))[0]  # as in the package, a projected zero token
        windows = _attend(block.attn, split_padded_windows(qkv, padding, window), stride)
        attended = block.attn.proj(join_padded_windows(windows, size))
    if window and fits:
        attended = join_windows(attended, size)
        shortcut = shortcut if shortcut is x else join_windows(shortcut, size)
    x = shortcut + block.drop_path(attended)
    if recompute_ffn and torch.is_grad_enabled():
        residual = checkpoint(_feed_forward, block, x, keep_input, use_reentrant=False, preserve_rng_state=False)
    else:
        residual = _feed_forward(block, x, project)
    output: Tensor = x + block.drop_path(residual)
    return output


def _feed_forward(block: Any, x: Tensor, project: Callable[..., Tensor]) -> Tensor:
    hidden = project(block.norm2, x, block.mlp.layers[0])
    return project(block.mlp.act, hidden, block.mlp.layers[1])


def _attend(attention: Any, qkv: Tensor, stride: tuple[int, int] | None) -> Tensor:
    """Attend from every token to every other token of a window, [B, H, W, 3 D] -> [B, H', W', D]."""
    q, k, v = qkv.unflatten(3, (3, attention.num_heads, -1)).unbind(3)
    if stride:
        q = max_pool(q.flatten(3), stride).unflatten(3, (attention.num_heads, -1))
    q_heads, k_heads, v_heads = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    attended = F.scaled_dot_product_attention(q_heads, k_heads, v_heads)
    return attended.transpose(1, 2).reshape(*q.shape[:3], -1)


def split_windows(x: Tensor, side: int) -> Tensor:
    """Split a grid that windows divide, [F, H, W, C] -> [F * R * S, w, w, C]."""
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return x.transpose(2, 3).flatten(0, 2)


def join_windows(windows: Tensor, size: tuple[int, int]) -> Tensor:
    """Invert `split_windows`, [F * R * S, w, w, C] -> [F, H, W, C]."""
    side = windows.shape[1]
    x = windows.unflatten(0, (-1, size[0] // side, size[1] // side))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def split_padded_windows(x: Tensor, padding: Tensor, side: int) -> Tensor:
    """Split a grid padded with the token `padding` [C], [F, H, W, C] -> [F * R * S, w, w, C]."""
    height, width = x.shape[1:3]
    padded = padding.to(x.dtype).expand(len(x), height + -height % side, width + -width % side, -1).clone()
    padded[:, :height, :width] = x
    return split_windows(padded, side)


def join_padded_windows(windows: Tensor, size: tuple[int, int]) -> Tensor:
    """Invert `split_padded_windows` and drop the padding, [F * R * S, w, w, C] -> [F, H, W, C]."""
    (height, width), side = size, windows.shape[1]
    return join_windows(windows, (height + -height % side, width + -width % side))[:, :height, :width]


def max_pool(x: Tensor, stride: tuple[int, int] | None) -> Tensor:
    """Take the maximum over each `stride` of tokens, [F, H, W, C] -> [F, H', W', C]; return `x` without a stride."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), stride).permute(0, 2, 3, 1) if stride else x


# Activations that are cheap to recompute are not stored for the backward pass.


@dataclass(frozen=True)
class _Recompute:
    """Placeholder for a tensor of this shape that is recomputed instead of stored."""

    shape: torch.Size


def recompute_input(norm: Callable[[Tensor], Tensor], x: Tensor, projection: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute `projection(norm(x))`, and recompute `norm(x)` in the backward pass instead of storing it.

    Autograd stores the input of a norm or an activation, and its output again as the input of the next projection.
    Such outputs are 6 of the 16 values per token and channel that a transformer block stores. Recomputing them costs
    less than 1 % of step time, since no matrix product is repeated.

    Args:
        norm: a norm or an element-wise function; deterministic. projection: any function; may hold adapters.
    """
    hidden = norm(x)
    if not torch.is_grad_enabled():
        return projection(hidden)
    address, size, source = hidden.untyped_storage().data_ptr(), hidden.numel(), x.detach()

    def pack(tensor: Tensor) -> Tensor | _Recompute:
        # Under autocast the projection saves a half-precision copy in other storage, which stays stored.
        same = tensor.untyped_storage().data_ptr() == address and tensor.numel() == size and tensor.is_contiguous()
        return _Recompute(tensor.shape) if same else tensor

    def unpack(stored: Tensor | _Recompute) -> Tensor:
        if isinstance(stored, Tensor):
            return stored
        with torch.no_grad():
            return norm(source).reshape(stored.shape)

    with saved_tensors_hooks(pack, unpack):
        return projection(hidden)


def keep_input(norm: Callable[[Tensor], Tensor], x: Tensor, projection: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute `projection(norm(x))` and let autograd store what it needs."""
    return projection(norm(x))
