"""The tracker that training, evaluation and prediction share, built on the modules of the `sam2` package.

It computes what `sam2.modeling.sam2_base.SAM2Base` computes (Ravi et al. 2024, arXiv 2408.00714), and parity tests
compare both. Parameters keep their names, so that a state dict of `Tracker.sam` is a SAM 2 state dict.

Legend: F frames, N objects, C hidden width, M memory width, S input side, h and w = S / 16, K candidate masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsam2.fast.attention import attend_memory, memory_tokens
from medsam2.fast.encoder import encode_image, project_fine
from medsam2.fast.execution import SpeedSettings, attention_dropout, use_onednn
from medsam2.model.memory_bank import Attended, Memory, MemoryBank, MemoryPolicy
from medsam2.prompts.kinds import Prompts

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

ABSENT_LOGIT = -1024.0
MASK_LOGIT = 10.0


@dataclass(frozen=True)
class Features:
    """Encoder output of F frames (or, after `select`, one frame for each of N objects).

    Attributes:
        embed: [F, C, h, w]. position: [1, C, h, w].
        high_res: ([F, C/8, 4h, 4w], [F, C/4, 2h, 2w]), already projected for the mask decoder.
        distinct: [U, C, h, w] the U < N frames on which the N objects are, or None where each object has a frame.
        owner: int64 [N], the row of `distinct` of each object, or None where `distinct` is None.
    """

    embed: Tensor
    position: Tensor
    high_res: tuple[Tensor, Tensor]
    distinct: Tensor | None = None
    owner: Tensor | None = None

    def select(self, index: Tensor) -> Features:
        """Return the features of the frames at `index` int64 [N]."""
        fine, middle = (_rows(values, index) for values in self.high_res)
        distinct, owner = (self.embed, index) if len(self.embed) < len(index) else (None, None)
        return Features(_rows(self.embed, index), self.position, (fine, middle), distinct, owner)

    def by_time(self, num_frames: int) -> list[Features]:
        """Split clip-major features of B clips into one `Features` [B, ...] per frame, of all clips.

        unbind once: indexing per frame would allocate a full-size zero gradient for every frame.
        """
        embed = self.embed.unflatten(0, (-1, num_frames)).unbind(1)
        fine, middle = (values.unflatten(0, (-1, num_frames)).unbind(1) for values in self.high_res)
        return [Features(e, self.position, (f, m)) for e, f, m in zip(embed, fine, middle, strict=True)]


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Return `values[index]`, without a copy where there is only one row."""
    return values.expand(len(index), *values.shape[1:]) if len(values) == 1 else values[index]


@dataclass(frozen=True)
class Decoded:
    """Output of the mask decoder, or a mask prompt used as the output.

    Attributes:
        all_logits: [N, K, 4h, 4w] candidates of the decoder (K = 3 with at most one point, else 1).
        ious: [N, K] predicted IoU. logits: [N, 1, 4h, 4w], the selected candidate, -1024 where the object is absent.
        object_score: [N, 1] logit of "the object is in this frame". pointer: [N, C].
        from_points: whether the prompt was points or a box. given_mask: [N, 1, S, S] logits of a mask prompt, or None.
        fallback: in training with K = 1, the three candidates ([N, 3, 4h, 4w], IoUs [N, 3]) that inference uses
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
    """One frame of a training clip: its index, the steps of the correction loop, and whether it was prompted."""

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
        policy: decides what a frame attends to; by default SAM 2's rule with the settings of `sam`. Clips whose
            objects share a bank (`condition`) use `clip_policy`: `policy` if it supports them, else SAM 2's rule.

    `medsam2.fast.execution.apply_speed` sets how the parts run.

    In `eval()` mode it decodes as the official video predictor does with its default post-processing: the single
    mask falls back to the best candidate when it is unstable, and masks from points are binarised before their memory
    is encoded.
    """

    previous_limit: float | None = 32.0
    """Previous-step logits are clamped to this value before a correction click; Meta's training does not clamp."""

    def __init__(self, sam: SAM2Base, policy: MemoryPolicy | None = None) -> None:
        super().__init__()
        use_onednn(sam)
        self.sam = sam
        self.training = sam.training  # nn.Module.__init__ sets True, but a wrapper should not change the mode
        self.speed = SpeedSettings()
        self.policy: MemoryPolicy = policy or MemoryPolicy.for_network(sam)
        self.clip_policy = self.policy if self.policy.in_clips else MemoryPolicy.for_network(sam)
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
        """Run the image encoder on normalised frames [F, 3, S, S]."""
        encoder, decoder = self.sam.image_encoder, self.sam.sam_mask_decoder
        stages, coarse, position = encode_image(encoder, frames, self.speed)
        return Features(coarse, position, project_fine(encoder, stages, (decoder.conv_s0, decoder.conv_s1)))

    def segment(
        self,
        features: Features,
        bank: MemoryBank,
        frame: int,
        prompts: Prompts | None = None,
        previous: Tensor | None = None,
        initial: bool | None = None,
        conditioned: Tensor | None = None,
    ) -> Decoded:
        """Segment N objects on one frame.

        Args:
            features: one frame for each object (`Features.select`).
            bank: the memories of earlier frames. frame: this frame's index in the clip.
            prompts: this frame's prompts, or None to track from memory alone.
            previous: [N, 1, 4h, 4w] logits of the previous step, which `prompts` corrects.
            initial: decode without memory; by default when the bank holds no conditioning frame.
            conditioned: the result of `condition` for this frame, to decode it more than once.

        Raises:
            ValueError: neither prompts nor a conditioning frame in the bank.
        """
        if prompts is not None and prompts.masks is not None:
            return self._from_mask(features, prompts.masks)
        if initial is None:
            initial = not bank.conditioning
        if initial and prompts is None:
            raise ValueError("a frame without prompts needs a conditioning frame in the memory bank")
        if conditioned is None:
            conditioned = self.condition(features, bank, frame, initial=initial)
        if previous is not None and self.previous_limit is not None:
            previous = previous.clamp(-self.previous_limit, self.previous_limit)
        points = 0 if prompts is None or prompts.labels is None else prompts.labels.shape[1]
        return self._decode(conditioned, features.high_res, prompts, previous, multimask=points <= 1)

    def condition(
        self,
        features: Features,
        bank: MemoryBank,
        frame: int,
        reverse: bool = False,
        num_frames: int | None = None,
        initial: bool | None = None,
    ) -> Tensor:
        """Condition one frame's features on memory; return the input of the mask decoder, [N, C, h, w].

        The result is the same for every prompt and correction of the frame.

        Args:
            features, bank, frame, initial: see `segment`.
            reverse: whether frames are visited from the last to the first.
            num_frames: length of the clip, which bounds the distance of object pointers; None for no bound.
        """
        if initial or (initial is None and not bank.conditioning):
            return features.embed + self.sam.no_mem_embed.reshape(1, -1, 1, 1)
        length = num_frames if num_frames is not None else 1 << 30
        return self._attend(features, self.clip_policy.attend(bank, frame, reverse, length, self.training))

    def memorise(self, features: Features, decoded: Decoded, dtype: torch.dtype | None = None) -> Memory:
        """Run the memory encoder on a frame's features and masks; store spatial features as `dtype` unless None."""
        sam = self.sam
        logits = decoded.logits if decoded.given_mask is None else decoded.given_mask
        binarise = decoded.from_points and not self.training
        memory = self.speed.run("memory_encoder", encode_memory, sam, features.embed, logits, binarise)
        if sam.no_obj_embed_spatial is not None:
            absent = (decoded.object_score <= 0).to(memory.dtype)[..., None, None]
            memory = memory + absent * sam.no_obj_embed_spatial[..., None, None]
        return Memory(memory if dtype is None else memory.to(dtype), decoded.pointer)

    def _attend(self, features: Features, attended: Attended) -> Tensor:
        """Run memory attention: [N, C, h, w] features conditioned on the memories that the policy selected."""
        sam, embed = self.sam, features.embed
        values, keys, pointer_tokens = memory_tokens(sam, [attended], embed)
        # With dropout, a shared self-attention would use one dropout mask for all objects of a frame.
        shared = features.distinct is not None and not (self.training and attention_dropout(sam))
        frames, owner = (features.distinct, features.owner) if shared else (embed, None)
        assert frames is not None
        return attend_memory(
            sam.memory_attention, frames, owner, features.position, values, keys, pointer_tokens, self.speed
        )

    def _decode(
        self,
        embed: Tensor,
        high_res: tuple[Tensor, Tensor],
        prompts: Prompts | None,
        previous: Tensor | None,
        multimask: bool,
    ) -> Decoded:
        """Run prompt encoder and mask decoder, and select among the candidate masks."""
        sam, count = self.sam, embed.shape[0]
        if prompts is not None and prompts.points is not None and prompts.labels is not None:
            points = (prompts.points, prompts.labels)
        else:
            points = (embed.new_zeros(count, 1, 2), embed.new_full((count, 1), -1, dtype=torch.int32))
        all_masks, all_ious, all_tokens, score = self.speed.run(
            "mask_decoder", predict_masks, sam, embed, points, previous, *high_res
        )
        fallback = None
        if multimask:
            candidates, ious = all_masks[:, 1:], all_ious[:, 1:]
        elif self.training:
            candidates, ious = all_masks[:, :1], all_ious[:, :1]
            fallback = (all_masks[:, 1:].float(), all_ious[:, 1:])
        else:
            candidates, ious = sam.sam_mask_decoder._dynamic_multimask_via_stability(all_masks, all_ious)
        candidates = candidates.float()
        logits, token = candidates, all_tokens[:, 0]
        if multimask:
            rows, best = torch.arange(count, device=embed.device), ious.argmax(-1)
            logits, token = candidates[rows, best][:, None], all_tokens[rows, 1 + best]
        present = score > 0
        logits = torch.where(present[..., None, None], logits, ABSENT_LOGIT)
        pointer = self._pointer(sam.obj_ptr_proj(token), present.to(token.dtype))
        return Decoded(candidates, ious, logits, score, pointer, from_points=prompts is not None, fallback=fallback)

    def _pointer(self, pointer: Tensor, present: Tensor) -> Tensor:
        """Return pointers [N, C], with SAM 2's no-object pointer where the object is absent (`present` [N, 1] is 0)."""
        return present * pointer + (1 - present) * self.sam.no_obj_ptr

    def _from_mask(self, features: Features, masks: Tensor) -> Decoded:
        """Return a mask prompt as the frame's output; the decoder only computes its object pointer."""
        sam = self.sam
        masks = masks.to(features.embed.dtype)
        logits = masks * 2 * MASK_LOGIT - MASK_LOGIT
        size = (sam.image_size // 4,) * 2
        low = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False, antialias=True)
        dense = sam.mask_downsample(masks)
        if dense.shape[-2:] != tuple(sam.sam_prompt_encoder.mask_input_size):
            dense = F.interpolate(
                dense.float(), sam.sam_prompt_encoder.mask_input_size, mode="bilinear", antialias=True
            )
        pointer = self._decode(features.embed, features.high_res, None, dense, False).pointer
        present = masks.flatten(1).any(1, keepdim=True).to(pointer.dtype)
        score = present * 2 * MASK_LOGIT - MASK_LOGIT
        pointer = self._pointer(pointer, present)
        ious = masks.new_ones(masks.shape[0], 1)
        return Decoded(low, ious, low, score, pointer, from_points=False, given_mask=logits)


def predict_masks(
    sam: SAM2Base,
    embed: Tensor,
    points: tuple[Tensor, Tensor],
    previous: Tensor | None,
    fine: Tensor,
    middle: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run prompt encoder and mask decoder.

    Returns:
        all four masks [N, 4, 4h, 4w], their IoUs [N, 4], their tokens [N, 4, C], and object scores [N, 1].
    """
    sparse, dense = sam.sam_prompt_encoder(points=points, boxes=None, masks=previous)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = sam.sam_mask_decoder.predict_masks(
        image_embeddings=embed,
        image_pe=sam.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        repeat_image=False,
        high_res_features=[fine, middle],
    )
    return outputs


def encode_memory(sam: SAM2Base, embed: Tensor, logits: Tensor, binarise: bool) -> Tensor:
    """Encode features [N, C, h, w] and mask logits [N, 1, any, any] as spatial memories [N, M, h, w]."""
    logits = logits.float()
    if logits.shape[-1] != sam.image_size:
        logits = F.interpolate(logits, (sam.image_size,) * 2, mode="bilinear", align_corners=False)
    mask = (logits > 0).float() if binarise else torch.sigmoid(logits)
    mask = mask * sam.sigmoid_scale_for_mem_enc + sam.sigmoid_bias_for_mem_enc
    memory: Tensor = sam.memory_encoder(embed, mask, skip_mask_sigmoid=True)["vision_features"]
    return memory
