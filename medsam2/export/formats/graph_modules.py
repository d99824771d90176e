"""The graphs of an export as modules over those of the `sam2` package: see `graphs.py`.

Legend: N prompts, S model input side, h = w = S / 16, Q = h * w, C hidden width, M memory width, E memories, K object
pointers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ABSENT_LOGIT = -1024.0
PREVIOUS_LIMIT = 32.0


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
    """Prompt encoder and mask decoder: all four candidates."""

    def __init__(self, sam: Any) -> None:
        super().__init__()
        self.prompts, self.decoder = sam.sam_prompt_encoder, sam.sam_mask_decoder
        self.register_buffer("grid", sam.sam_prompt_encoder.get_dense_pe().detach())
        self.grid: Tensor

    def candidates(
        self,
        embed: Tensor,
        fine: Tensor,
        middle: Tensor,
        points: Tensor,
        labels: Tensor,
        mask: Tensor,
        has_mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sparse = self.prompts._embed_points(points, labels, True)
        given = self.prompts._embed_masks(mask)
        none = self.prompts.no_mask_embed.weight.reshape(1, -1, 1, 1)
        share = has_mask.reshape(-1, 1, 1, 1)
        found: tuple[Tensor, Tensor, Tensor, Tensor] = self.decoder.predict_masks(
            image_embeddings=embed.expand(points.shape[0], -1, -1, -1),
            image_pe=self.grid,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=share * given + (1 - share) * none,
            repeat_image=False,
            high_res_features=[fine, middle],
        )
        return found


class Decoder(_Prompted):
    """The contract of annotation tools: always three candidates [N, 3, S/4, S/4] and their predicted IoUs [N, 3].

    A tool takes the one whose predicted IoU is largest. Three tokens answer to one click; to a box or several clicks
    there is one answer, which stands there three times, so that such a tool takes the one that was trained for it.
    """

    def __init__(self, sam: Any) -> None:
        super().__init__(sam)
        self.most = sam.multimask_max_pt_num

    def forward(
        self,
        embed: Tensor,
        fine: Tensor,
        middle: Tensor,
        points: Tensor,
        labels: Tensor,
        mask: Tensor,
        has_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        mask = mask.clamp(-PREVIOUS_LIMIT, PREVIOUS_LIMIT)  # a tool may give logits back as they came
        every, ious, _, _ = self.candidates(embed, fine, middle, points, labels, mask, has_mask)
        single, single_iou = _single(every, ious)
        few = ((labels >= 0).sum(1) <= self.most)[:, None]
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
        self.sam = _Options(sam)
        self.register_buffer("nobody", sam.no_obj_ptr.detach().reshape(1, 1, -1))
        self.nobody: Tensor

    def forward(
        self,
        embed: Tensor,
        fine: Tensor,
        middle: Tensor,
        points: Tensor,
        labels: Tensor,
        mask: Tensor,
        has_mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        every, ious, tokens, score = self.candidates(embed, fine, middle, points, labels, mask, has_mask)
        present = (score > 0).float() if self.sam.scored else torch.ones_like(score)
        pointers = self.pointer(tokens)
        if self.sam.scored:
            share = (score.sigmoid() if self.sam.soft else present)[..., None]
            pointers = (share * pointers if self.sam.fixed else pointers) + (1 - share) * self.nobody
        masks = torch.where(present[..., None, None] > 0, every, ABSENT_LOGIT)
        return masks, ious, pointers, score


class _Options:
    """The switches of `SAM2Base` that decide what an object pointer is."""

    def __init__(self, sam: Any) -> None:
        self.scored, self.soft, self.fixed = sam.pred_obj_scores, sam.soft_no_obj_ptr, sam.fixed_no_obj_ptr


class MemoryEncoder(nn.Module):
    """image_embed [1, C, h, w], mask logits [1, 1, S/4, S/4], score [1, 1], prompted [1] (1 or 0) -> [1, M, h, w]."""

    def __init__(self, sam: Any) -> None:
        super().__init__()
        self.encoder, self.no_memory = sam.memory_encoder, sam.no_mem_embed.reshape(1, -1, 1, 1)
        self.side, self.scale, self.bias = (
            sam.image_size,
            sam.sigmoid_scale_for_mem_enc,
            sam.sigmoid_bias_for_mem_enc,
        )
        absent = sam.no_obj_embed_spatial
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
    """

    def __init__(self, sam: Any) -> None:
        super().__init__()
        self.attention, self.no_memory = sam.memory_attention, sam.no_mem_embed.reshape(1, -1, 1, 1)
        self.pieces, self.width = sam.hidden_dim // sam.mem_dim, sam.mem_dim
        self.timed, self.projection = sam.add_tpos_enc_to_obj_ptrs, sam.obj_ptr_tpos_proj
        wide = sam.hidden_dim if sam.proj_tpos_enc_in_obj_ptrs else sam.mem_dim
        half = torch.arange(wide // 2, dtype=torch.float32)
        buffers = {
            "place": sam.image_place.flatten(2).transpose(1, 2),
            "memory_place": sam.memory_place.flatten(2).transpose(1, 2),
            "times": sam.maskmem_tpos_enc.detach().flatten(1),
            "periods": 10000 ** (2 * (half // 2) / (wide // 2)),
        }
        first = sam.memory_attention.layers[0].self_attn
        cells = round(first.freqs_cis.shape[0] ** 0.5)
        if cells != sam.image_size // 16:
            raise AssertionError(f"rotations are for {cells} cells a side, the network has {sam.image_size // 16}")
        buffers |= {"cosines": first.freqs_cis.real.clone(), "sines": first.freqs_cis.imag.clone()}
        for name, value in buffers.items():
            self.register_buffer(name, value.detach().cpu())

    def forward(
        self, image_embed: Tensor, memories: Tensor, memory_times: Tensor, pointers: Tensor, pointer_times: Tensor
    ) -> Tensor:
        here: Tensor = self.place  # type: ignore[assignment]
        height, width = image_embed.shape[-2:]
        x = (image_embed - self.no_memory).flatten(2).transpose(1, 2)
        if self.attention.pos_enc_at_input:
            x = x + 0.1 * here
        tokens = memories.flatten(2).transpose(1, 2)
        keys = tokens + (self.memory_place + self.times[memory_times][:, None])  # type: ignore[index, operator]
        pieces = pointers.reshape(-1, self.width)
        values = torch.cat([tokens.reshape(-1, self.width), pieces])[None]
        keys = torch.cat([keys.reshape(-1, self.width), pieces + self._ages(pointer_times, pieces)])[None]
        for layer in self.attention.layers:
            x = self._layer(layer, x, here, keys, values, memories.shape[0])
        output: Tensor = self.attention.norm(x).transpose(1, 2).unflatten(2, (height, width))
        return output

    def _ages(self, times: Tensor, like: Tensor) -> Tensor:
        """Temporal encodings of the pointers' pieces [K * pieces, M]."""
        if not self.timed:
            return torch.zeros_like(like)
        angles = times[:, None] / self.periods  # type: ignore[operator]
        ages = self.projection(torch.cat([angles.sin(), angles.cos()], -1))
        found: Tensor = ages[:, None].expand(-1, self.pieces, -1).reshape(-1, self.width)
        return found

    def _layer(self, layer: Any, x: Tensor, here: Tensor, keys: Tensor, values: Tensor, memories: int) -> Tensor:
        normed = layer.norm1(x)
        query = normed + here if layer.pos_enc_at_attn else normed
        x = x + self._attend(layer.self_attn, query, query, normed, 1)
        normed = layer.norm2(x)
        query = normed + here if layer.pos_enc_at_cross_attn_queries else normed
        key = keys if layer.pos_enc_at_cross_attn_keys else values
        x = x + self._attend(layer.cross_attn_image, query, key, values, memories)
        output: Tensor = x + layer.linear2(layer.activation(layer.linear1(layer.norm3(x))))
        return output

    def _attend(self, attention: Any, query: Tensor, key: Tensor, value: Tensor, memories: int) -> Tensor:
        """`RoPEAttention.forward`; keys behind the `memories` pictures have no place."""
        q, k, v = attention.q_proj(query), attention.k_proj(key), attention.v_proj(value)
        placed = memories * q.shape[1]
        k = torch.cat([self._rotated(k[:, :placed]), k[:, placed:]], 1)
        q = self._rotated(q)
        heads = attention.num_heads
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        output: Tensor = attention.out_proj(attended)
        return output

    def _rotated(self, x: Tensor) -> Tensor:
        """Pairs of channels [1, pictures * Q, C] turned by the angles of their cell; SAM 2 has one head here."""
        cosines, sines = self.cosines, self.sines
        assert isinstance(cosines, Tensor) and isinstance(sines, Tensor)
        pairs = x.reshape(-1, *cosines.shape, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        turned = torch.stack([even * cosines - odd * sines, even * sines + odd * cosines], -1)
        return turned.reshape(1, -1, x.shape[-1])
