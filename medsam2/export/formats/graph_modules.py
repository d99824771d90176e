"""The graphs of an export as modules over those of the `sam2` package: see `graphs.py`.

Legend: N prompts, S model input side, h = w = S / 16, Q = h * w, C hidden width, M memory width, E memories, K object
pointers.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsam2.model.build import import_sam2

ABSENT_LOGIT = -1024.0
MAX_POINTS_OF_SEVERAL_MASKS = 1  # three candidates answer to one click, one mask to everything else


class Encoder(nn.Module):
    """image [1, 3, S, S] (normalised) -> [1, C/8, S/4, S/4], [1, C/4, S/8, S/8], [1, C, h, w].

    `no_mem_embed` is in the last one already, as annotation tools expect it.
    """

    def __init__(self, sam: Any) -> None:
        super().__init__()
        self.encoder, self.no_memory = sam.image_encoder, sam.no_mem_embed.reshape(1, -1, 1, 1)
        self.fine, self.middle = sam.sam_mask_decoder.conv_s0, sam.sam_mask_decoder.conv_s1

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine, middle, coarse = self.encoder(image)["backbone_fpn"]
        return self.fine(fine), self.middle(middle), coarse + self.no_memory


class _Prompted(nn.Module):
    """Prompt encoder and mask decoder; subclasses say what is made of the four candidates."""

    previous_limit = math.inf  # logits of an earlier mask are clamped to it

    def __init__(self, sam: Any) -> None:
        super().__init__()
        self.prompts, self.decoder = sam.sam_prompt_encoder, sam.sam_mask_decoder
        self.grid = nn.Buffer(sam.sam_prompt_encoder.get_dense_pe().detach())

    def forward(
        self,
        embed: Tensor,
        fine: Tensor,
        middle: Tensor,
        points: Tensor,
        labels: Tensor,
        mask: Tensor,
        has_mask: Tensor,
    ) -> tuple[Tensor, ...]:
        no_mask = self.prompts.no_mask_embed.weight.reshape(1, -1, 1, 1)
        dense = self.prompts._embed_masks(mask.clamp(-self.previous_limit, self.previous_limit))
        share = has_mask.reshape(-1, 1, 1, 1)
        candidates = self.decoder.predict_masks(
            image_embeddings=embed.expand(points.shape[0], -1, -1, -1),
            image_pe=self.grid,
            sparse_prompt_embeddings=self.prompts._embed_points(points, labels, True),
            dense_prompt_embeddings=share * dense + (1 - share) * no_mask,
            repeat_image=False,
            high_res_features=[fine, middle],
        )
        return self.answer(labels, *candidates)

    def answer(self, labels: Tensor, every: Tensor, ious: Tensor, tokens: Tensor, score: Tensor) -> tuple[Tensor, ...]:
        """From labels [N, P], masks [N, 4, S/4, S/4], predicted IoUs [N, 4], tokens [N, 4, C] and scores [N, 1]."""
        raise NotImplementedError


class Decoder(_Prompted):
    """The contract of annotation tools: always three candidates [N, 3, S/4, S/4] and their predicted IoUs [N, 3].

    A tool takes the one whose predicted IoU is largest. Three tokens answer to one click; to a box or several clicks
    there is one answer, which stands there three times, so that such a tool takes the one that was trained for it.
    """

    previous_limit = 32.0  # a tool may give logits back as they came

    def answer(self, labels: Tensor, every: Tensor, ious: Tensor, tokens: Tensor, score: Tensor) -> tuple[Tensor, ...]:
        single, single_iou = _single(every, ious)
        few = ((labels >= 0).sum(1) <= MAX_POINTS_OF_SEVERAL_MASKS)[:, None]
        masks = torch.where(few[..., None, None], every[:, 1:], single.expand_as(every[:, 1:]))
        return masks, torch.where(few, ious[:, 1:], single_iou.expand_as(ious[:, 1:]))


def _single(every: Tensor, ious: Tensor) -> tuple[Tensor, Tensor]:
    """The first candidate, or the surest of the others where it is unstable: [N, 1, ...] each.

    `MaskDecoder._dynamic_multimask_via_stability` with its default numbers; a weighted sum in place of an index.
    """
    first = every[:, :1].flatten(-2)
    inner, outer = (first > 0.05).sum(-1).float(), (first > -0.05).sum(-1).float()
    stable = torch.where(outer > 0, inner / outer.clamp(min=1), 1.0) >= 0.98
    best = F.one_hot(ious[:, 1:].argmax(-1), 3).bool()
    mask = torch.where(best[..., None, None], every[:, 1:], 0.0).sum(1, keepdim=True)
    iou = torch.where(best, ious[:, 1:], 0.0).sum(1, keepdim=True)
    return torch.where(stable[..., None, None], every[:, :1], mask), torch.where(stable, ious[:, :1], iou)


class TrackingDecoder(_Prompted):
    """All four candidates of one object, their predicted IoUs [1, 4], object pointers [1, 4, C], and the score."""

    def __init__(self, sam: Any) -> None:
        super().__init__(sam)
        self.pointer = sam.obj_ptr_proj
        self.absent_pointer = nn.Buffer(sam.no_obj_ptr.detach().reshape(1, 1, -1))

    def answer(self, labels: Tensor, every: Tensor, ious: Tensor, tokens: Tensor, score: Tensor) -> tuple[Tensor, ...]:
        present = (score > 0)[..., None]
        pointers = torch.where(present, self.pointer(tokens), self.absent_pointer)
        return torch.where(present[..., None], every, ABSENT_LOGIT), ious, pointers, score


class MemoryEncoder(nn.Module):
    """image_embed [1, C, h, w], mask logits [1, 1, S/4, S/4], score [1, 1], prompted [1] (1 or 0) -> [1, M, h, w]."""

    def __init__(self, sam: Any) -> None:
        super().__init__()
        self.encoder, self.no_memory = sam.memory_encoder, sam.no_mem_embed.reshape(1, -1, 1, 1)
        self.side, self.scale, self.bias = sam.image_size, sam.sigmoid_scale_for_mem_enc, sam.sigmoid_bias_for_mem_enc
        absent = sam.no_obj_embed_spatial  # version 2.1 has it
        self.absent = None if absent is None else absent.detach()[..., None, None]

    def forward(
        self, image_embed: Tensor, mask_logits: Tensor, object_score_logits: Tensor, prompted: Tensor
    ) -> Tensor:
        logits = F.interpolate(mask_logits, (self.side,) * 2, mode="bilinear", align_corners=False)
        mask = torch.where(prompted.reshape(-1, 1, 1, 1) > 0, (logits > 0).float(), logits.sigmoid())
        mask = mask * self.scale + self.bias
        memory: Tensor = self.encoder(image_embed - self.no_memory, mask, skip_mask_sigmoid=True)["vision_features"]
        if self.absent is not None:
            memory = memory + (object_score_logits <= 0).float()[..., None, None] * self.absent
        return memory


class MemoryAttention(nn.Module):
    """The features of a frame conditioned on memory: [1, C, h, w].

    Inputs: image_embed [1, C, h, w]; memories [E, M, h, w] and the rows [E] of their temporal encoding (6 for prompted
    frames, distance - 1 for others); pointers [K, C] and their distances divided by the span [K].

    It changes how the attentions of `sam` rotate: with cosines and sines, since ONNX has no complex numbers.
    """

    def __init__(self, sam: Any) -> None:
        super().__init__()
        self.attention, self.no_memory = sam.memory_attention, sam.no_mem_embed.reshape(1, -1, 1, 1)
        self.width, self.memory_width = sam.hidden_dim, sam.mem_dim
        # Version 2.1 tells the network how old a pointer is.
        self.projection = sam.obj_ptr_tpos_proj if sam.add_tpos_enc_to_obj_ptrs else None
        self.sine_encoding = import_sam2("sam2.modeling.sam2_utils").get_1d_sine_pe
        rotations = sam.memory_attention.layers[0].self_attn.freqs_cis
        self.image_place = nn.Buffer(sam.image_place.flatten(2).permute(2, 0, 1))
        self.memory_place = nn.Buffer(sam.memory_place.flatten(2).transpose(1, 2))
        self.times = nn.Buffer(sam.maskmem_tpos_enc.detach().flatten(1))
        self.cosines, self.sines = nn.Buffer(rotations.real.clone()), nn.Buffer(rotations.imag.clone())
        for layer in sam.memory_attention.layers:
            for attention in (layer.self_attn, layer.cross_attn_image):
                attention.forward = partial(self._attend, attention)

    def forward(
        self, image_embed: Tensor, memories: Tensor, memory_times: Tensor, pointers: Tensor, pointer_times: Tensor
    ) -> Tensor:
        tokens = memories.flatten(2).transpose(1, 2)
        places = self.memory_place + self.times[memory_times][:, None]
        pieces = pointers.reshape(-1, 1, self.memory_width)  # a pointer is as wide as several memories
        ages = torch.zeros_like(pieces)
        if self.projection is not None:
            encoded = self.projection(self.sine_encoding(pointer_times, dim=self.width))
            ages = encoded[:, None].expand(-1, self.width // self.memory_width, -1).reshape(pieces.shape)
        conditioned: Tensor = self.attention(
            curr=(image_embed - self.no_memory).flatten(2).permute(2, 0, 1),
            curr_pos=self.image_place,
            memory=torch.cat([tokens.reshape(-1, 1, self.memory_width), pieces]),
            memory_pos=torch.cat([places.reshape(-1, 1, self.memory_width), ages]),
            num_obj_ptr_tokens=pieces.shape[0],
        )
        return conditioned.permute(1, 2, 0).reshape(image_embed.shape)

    def _attend(self, attention: Any, q: Tensor, k: Tensor, v: Tensor, num_k_exclude_rope: int = 0) -> Tensor:
        """`RoPEAttention.forward` of one head; the last `num_k_exclude_rope` keys have no place."""
        q, k, v = attention.q_proj(q), attention.k_proj(k), attention.v_proj(v)
        placed = k.shape[1] - num_k_exclude_rope
        k = torch.cat([self._rotated(k[:, :placed]), k[:, placed:]], 1)
        attended = F.scaled_dot_product_attention(self._rotated(q)[:, None], k[:, None], v[:, None])
        output: Tensor = attention.out_proj(attended[:, 0])
        return output

    def _rotated(self, x: Tensor) -> Tensor:
        """Pairs of channels [1, pictures * Q, C] turned by the angles of their cell."""
        even, odd = x.reshape(-1, *self.cosines.shape, 2).unbind(-1)
        turned = torch.stack([even * self.cosines - odd * self.sines, even * self.sines + odd * self.cosines], -1)
        return turned.reshape(1, -1, x.shape[-1])
