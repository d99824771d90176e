"""The one tracker of training, evaluation, prediction and the app, over the modules of the `sam2` package.

What is computed is what `sam2.modeling.sam2_base.SAM2Base` computes (Ravi et al. 2024, arXiv 2408.00714); the
package's parameters keep their names, so that a state dict of `Tracker.sam` is a SAM 2 state dict. Tests hold
both against each other.

Legend: F frames, N objects, C hidden width, M memory width, S input side, h and w = S / 16, K candidate masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsam2.model.memory import Attended, Memory, MemoryBank, MemoryPolicy, Sam2Policy
from medsam2.prompts.kinds import Prompts

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

ABSENT_LOGIT = -1024.0
MASK_LOGIT = 10.0
PREVIOUS_LIMIT = 32.0


@dataclass(frozen=True)
class Features:
    """Encoder output of F frames (or, after `select`, one frame for each of N objects).

    Attributes:
        embed: [F, C, h, w]. position: [1, C, h, w].
        high_res: ([F, C/8, 4h, 4w], [F, C/4, 2h, 2w]), already projected for the mask decoder.
    """

    embed: Tensor
    position: Tensor
    high_res: tuple[Tensor, Tensor]

    def select(self, index: Tensor) -> Features:
        """The frames at `index` int64 [N]."""
        return Features(self.embed[index], self.position, (self.high_res[0][index], self.high_res[1][index]))


@dataclass(frozen=True)
class Decoded:
    """One call of the mask decoder, or a mask prompt taken as the output.

    Attributes:
        all_logits: [N, K, 4h, 4w] candidates as the decoder gave them (K = 3 with at most one point, else 1).
        ious: [N, K] predicted IoU. logits: [N, 1, 4h, 4w], the chosen candidate, -1024 where the object is absent.
        object_score: [N, 1] logit of "the object is in this frame". pointer: [N, C].
        from_points: whether points or a box led to it. given_mask: [N, 1, S, S] logits of a mask prompt, or None.
        fallback: in training with K = 1, the three candidates ([N, 3, 4h, 4w], IoUs [N, 3]) that inference takes
            where the single mask is unstable.
    """

    all_logits: Tensor
    ious: Tensor
    logits: Tensor
    object_score: Tensor
    pointer: Tensor
    from_points: bool = False
    given_mask: Tensor | None = None
    fallback: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class TrackedFrame:
    """One frame of a rolled-out clip: its index, the steps of the correction loop, whether it was prompted."""

    frame: int
    steps: tuple[Decoded, ...]
    conditioning: bool

    @property
    def final(self) -> Decoded:
        return self.steps[-1]


class Tracker(nn.Module):
    """Encode frames, segment objects on a frame given prompts and memory, turn the result into memory.

    Args:
        sam: a `SAM2Base` (see `medsam2.model.build`).
        policy: what a frame attends to; SAM 2's rule with the numbers of `sam` by default.

    In `eval()` mode it decodes as the official video predictor does with its default post-processing: the single
    mask falls back to the best candidate when it is unstable, and masks from points are binarised before they
    are memorised.
    """

    def __init__(self, sam: SAM2Base, policy: MemoryPolicy | None = None) -> None:
        super().__init__()
        self.sam = sam
        self.policy: MemoryPolicy = policy or Sam2Policy(
            slots=sam.num_maskmem,
            max_pointers=sam.max_obj_ptrs_in_encoder,
            max_conditioning=sam.max_cond_frames_in_attn,
            stride=sam.memory_temporal_stride_for_eval,
            past_pointers_only=sam.only_obj_ptrs_in_the_past_for_eval,
        )
        decoder = sam.sam_mask_decoder
        decoder.dynamic_multimask_via_stability = True
        decoder.dynamic_multimask_stability_delta = 0.05
        decoder.dynamic_multimask_stability_thresh = 0.98

    @property
    def image_size(self) -> int:
        return int(self.sam.image_size)

    @property
    def device(self) -> torch.device:
        return self.sam.no_mem_embed.device

    def encode(self, frames: Tensor) -> Features:
        """Image encoder: normalised frames [F, 3, S, S] -> `Features`."""
        frozen = not any(p.requires_grad for p in self.sam.image_encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            output = self.sam.image_encoder(frames)
        levels, positions = output["backbone_fpn"][-3:], output["vision_pos_enc"]
        decoder = self.sam.sam_mask_decoder
        return Features(levels[2], positions[-1][:1], (decoder.conv_s0(levels[0]), decoder.conv_s1(levels[1])))

    def segment(
        self,
        features: Features,
        bank: MemoryBank,
        frame: int,
        prompts: Prompts | None = None,
        previous: Tensor | None = None,
        reverse: bool = False,
        num_frames: int | None = None,
        initial: bool | None = None,
    ) -> Decoded:
        """Segment N objects on one frame.

        Args:
            features: one frame for each object (`Features.select`).
            bank: what was memorised so far. frame: this frame's index in the clip.
            prompts: this frame's prompts, or None to track from memory alone.
            previous: [N, 1, 4h, 4w] logits of the step before, when `prompts` corrects them.
            reverse: whether frames are visited from the last to the first.
            num_frames: length of the clip (bounds the pointers); unknown means long.
            initial: decode without memory; by default when the bank holds no conditioning frame.

        Raises:
            ValueError: neither prompts nor a conditioning frame in the bank.
        """
        if prompts is not None and prompts.masks is not None:
            return self._from_mask(features, prompts.masks)
        if initial is None:
            initial = not bank.conditioning
        if initial and prompts is None:
            raise ValueError("a frame without prompts needs a conditioning frame in the memory bank")
        if initial:
            embed = features.embed + self.sam.no_mem_embed.reshape(1, -1, 1, 1)
        else:
            length = num_frames if num_frames is not None else 1 << 30
            embed = self._attend(features, self.policy.attend(bank, frame, reverse, length, self.training))
        if previous is not None:
            previous = previous.clamp(-PREVIOUS_LIMIT, PREVIOUS_LIMIT)
        return self._decode(embed, features.high_res, prompts, previous, self._multimask(prompts, initial))

    def memorise(self, features: Features, decoded: Decoded, dtype: torch.dtype | None = None) -> Memory:
        """Memory encoder: features of the frame and its masks -> `Memory` (stored as `dtype` if given)."""
        sam = self.sam
        logits = decoded.given_mask
        if logits is None:
            logits = F.interpolate(decoded.logits.float(), (sam.image_size,) * 2, mode="bilinear", align_corners=False)
        mask = (logits > 0).float() if decoded.from_points and not self.training else torch.sigmoid(logits)
        mask = mask * sam.sigmoid_scale_for_mem_enc + sam.sigmoid_bias_for_mem_enc
        memory = sam.memory_encoder(features.embed, mask, skip_mask_sigmoid=True)["vision_features"]
        if sam.no_obj_embed_spatial is not None:
            absent = (decoded.object_score <= 0).to(memory.dtype)[..., None, None]
            memory = memory + absent * sam.no_obj_embed_spatial[..., None, None]
        return Memory(memory if dtype is None else memory.to(dtype), decoded.pointer)

    def _multimask(self, prompts: Prompts | None, initial: bool) -> bool:
        points = 0 if prompts is None or prompts.labels is None else prompts.labels.shape[1]
        sam = self.sam
        return bool(
            sam.multimask_output_in_sam
            and (initial or sam.multimask_output_for_tracking)
            and sam.multimask_min_pt_num <= points <= sam.multimask_max_pt_num
        )

    def _attend(self, features: Features, attended: Attended) -> Tensor:
        """Memory attention: [N, C, h, w] features conditioned on what the policy chose."""
        sam, embed = self.sam, features.embed
        count, width, height = embed.shape[0], sam.mem_dim, embed.shape[-2:]
        tokens, encodings = [], []
        for row, memory in attended.spatial:
            stored = memory.features.to(embed.dtype)
            place = sam.memory_encoder.position_encoding(stored[:1]).to(embed.dtype)
            tokens.append(stored.flatten(2).permute(2, 0, 1))
            time = sam.maskmem_tpos_enc[row].reshape(1, 1, -1)
            encodings.append((place.flatten(2).permute(2, 0, 1) + time).expand(-1, count, -1))
        pointer_tokens = 0
        if attended.pointers and sam.use_obj_ptrs_in_encoder:
            pieces = sam.hidden_dim // width
            pointers = torch.stack([p for _, p in attended.pointers]).to(embed.dtype)
            pointers = pointers.reshape(-1, count, pieces, width).permute(0, 2, 1, 3).flatten(0, 1)
            place = self._pointer_encoding([d for d, _ in attended.pointers], attended.pointer_span, embed)
            tokens.append(pointers)
            encodings.append(place.repeat_interleave(pieces, 0)[:, None].expand(-1, count, -1))
            pointer_tokens = pointers.shape[0]
        output = sam.memory_attention(
            curr=[embed.flatten(2).permute(2, 0, 1)],
            curr_pos=[features.position.flatten(2).permute(2, 0, 1).expand(-1, count, -1)],
            memory=torch.cat(tokens),
            memory_pos=torch.cat(encodings),
            num_obj_ptr_tokens=pointer_tokens,
        )
        return output.permute(1, 2, 0).reshape(count, -1, *height)

    def _pointer_encoding(self, distances: list[int], span: int, like: Tensor) -> Tensor:
        """Temporal encoding of object pointers: [number of pointers, M]."""
        from sam2.modeling.sam2_utils import get_1d_sine_pe

        sam = self.sam
        if not sam.add_tpos_enc_to_obj_ptrs:
            return like.new_zeros(len(distances), sam.mem_dim)
        if not sam.use_signed_tpos_enc_to_obj_ptrs:
            distances = [abs(d) for d in distances]
        place = torch.tensor(distances, device=like.device) / span
        dim = sam.hidden_dim if sam.proj_tpos_enc_in_obj_ptrs else sam.mem_dim
        return sam.obj_ptr_tpos_proj(get_1d_sine_pe(place, dim=dim).to(like.dtype))

    def _decode(
        self,
        embed: Tensor,
        high_res: tuple[Tensor, Tensor],
        prompts: Prompts | None,
        previous: Tensor | None,
        multimask: bool,
    ) -> Decoded:
        """Prompt encoder, mask decoder and the choice among candidates."""
        sam, count = self.sam, embed.shape[0]
        if prompts is not None and prompts.points is not None and prompts.labels is not None:
            points = (prompts.points, prompts.labels)
        else:
            points = (embed.new_zeros(count, 1, 2), embed.new_full((count, 1), -1, dtype=torch.int32))
        sparse, dense = sam.sam_prompt_encoder(points=points, boxes=None, masks=previous)
        inputs = {
            "image_embeddings": embed,
            "image_pe": sam.sam_prompt_encoder.get_dense_pe(),
            "sparse_prompt_embeddings": sparse,
            "dense_prompt_embeddings": dense,
            "repeat_image": False,
            "high_res_features": list(high_res),
        }
        fallback = None
        if self.training and not multimask:
            every, every_iou, output_tokens, score = sam.sam_mask_decoder.predict_masks(**inputs)
            candidates, ious, output_tokens = every[:, :1], every_iou[:, :1], output_tokens[:, :1]
            fallback = (every[:, 1:].float(), every_iou[:, 1:])
        else:
            candidates, ious, output_tokens, score = sam.sam_mask_decoder(**inputs, multimask_output=multimask)
        candidates = candidates.float()
        logits, token = candidates, output_tokens[:, 0]
        if multimask:
            rows, best = torch.arange(count, device=embed.device), ious.argmax(-1)
            logits = candidates[rows, best][:, None]
            token = output_tokens[rows, best] if output_tokens.shape[1] > 1 else token
        present = score > 0 if sam.pred_obj_scores else torch.ones_like(score, dtype=torch.bool)
        logits = torch.where(present[..., None, None], logits, ABSENT_LOGIT)
        pointer = self._pointer(sam.obj_ptr_proj(token), present.to(token.dtype), score)
        return Decoded(candidates, ious, logits, score, pointer, from_points=prompts is not None, fallback=fallback)

    def _pointer(self, pointer: Tensor, present: Tensor, score: Tensor) -> Tensor:
        sam = self.sam
        if not sam.pred_obj_scores:
            return pointer
        share = score.sigmoid() if sam.soft_no_obj_ptr else present
        if sam.fixed_no_obj_ptr:
            pointer = share * pointer
        return pointer + (1 - share) * sam.no_obj_ptr

    def _from_mask(self, features: Features, masks: Tensor) -> Decoded:
        """A mask prompt is the frame's output; the decoder only makes its object pointer."""
        sam = self.sam
        given = masks.to(features.embed.dtype)
        logits = given * 2 * MASK_LOGIT - MASK_LOGIT
        size = (sam.image_size // 4,) * 2
        low = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False, antialias=True)
        dense = sam.mask_downsample(given)
        if dense.shape[-2:] != tuple(sam.sam_prompt_encoder.mask_input_size):
            dense = F.interpolate(
                dense.float(), sam.sam_prompt_encoder.mask_input_size, mode="bilinear", antialias=True
            )
        pointer = self._decode(features.embed, features.high_res, None, dense, False).pointer
        present = given.flatten(1).any(1, keepdim=True).to(pointer.dtype)
        score = present * 2 * MASK_LOGIT - MASK_LOGIT
        pointer = self._pointer(pointer, present, score)
        ious = given.new_ones(given.shape[0], 1)
        return Decoded(low, ious, low, score, pointer, from_points=False, given_mask=logits)
