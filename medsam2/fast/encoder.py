"""The image encoder, run block by block: what `sam2`'s `ImageEncoder.forward` computes, with less work.

- Where windows do not divide the side (512 px: 32 cells in windows of 14), the package pads the tokens to 42 x 42 and
  projects the padding too. Projections see one token at a time, so that here only real tokens go through them.
- The two finer levels of the pyramid are only seen through another projection: both are applied as one matrix.
- Position encodings are made for the one level and the one frame that are used.

Legend: F frames, S input side, C width of a block, H and W its grid, D its output width, w side of a window, R and S
windows down and across (the last ones may reach beyond the grid).
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


def _trunk(trunk: Any, frames: Tensor, speed: SpeedSettings) -> list[Tensor]:
    """The output of each stage, finest first, channels in front."""
    x = trunk.patch_embed(frames)
    x = x + trunk._get_pos_embed(x.shape[1:3])
    outputs = []
    lean = "image_encoder" not in speed.checkpoint + speed.compile
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
            lateral = lateral + F.interpolate(found.float(), scale_factor=2.0, mode="nearest")
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
        lean: compute norms and activations again in the backward pass (`recompute_input`).
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


def windows(x: Tensor, side: int) -> Tensor:
    """[F, H, W, C] -> [F * R * S, w, w, C], where windows divide the grid."""
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return x.transpose(2, 3).flatten(0, 2)


def joined(parts: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `windows`: [F * R * S, w, w, C] -> [F, H, W, C]."""
    side = parts.shape[1]
    x = parts.unflatten(0, (-1, size[0] // side, size[1] // side))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def windows_beyond(x: Tensor, edge: Tensor, side: int) -> Tensor:
    """[F, H, W, C] -> [F * R * S, w, w, C]; what lies beyond the grid is `edge` [C]."""
    height, width = x.shape[1:3]
    padded = edge.to(x.dtype).expand(len(x), height + -height % side, width + -width % side, -1).clone()
    padded[:, :height, :width] = x
    return windows(padded, side)


def joined_within(parts: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `windows_beyond`, without what lies beyond: [F * R * S, w, w, C] -> [F, H, W, C]."""
    (height, width), side = size, parts.shape[1]
    return joined(parts, (height + -height % side, width + -width % side))[:, :height, :width]


def pooled(x: Tensor, stride: tuple[int, int] | None) -> Tensor:
    """The largest of each `stride` of the tokens: [F, H, W, C] -> [F, H', W', C]; no stride: the tokens themselves."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), stride).permute(0, 2, 3, 1) if stride else x


# Backward passes that keep less: what is cheap to compute again is not stored.


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
