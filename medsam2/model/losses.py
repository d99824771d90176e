"""Losses of SAM 2 training (Ravi et al. 2024, arXiv 2408.00714, appendix D; weights of Ma et al. 2025, 2504.03600).

Legend: N objects, K candidate masks, S side at which masks are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medsam2.model.tracker import Decoded, TrackedFrame


class LossSettings(BaseModel):
    """Weights and options of the loss.

    Attributes:
        focal, dice, iou, presence: weights of the terms; 20, 1, 1, 1 in SAM 2 and MedSAM2.
        focal_alpha, focal_gamma: parameters of the sigmoid focal loss (Lin et al. 2017); 0.25 and 2.
        resolution: side in pixels at which masks are compared; None for the full input side.
        fallback: weight of the same terms for the three candidates that inference falls back to where the single mask
            is unstable. SAM 2 trains these candidates only with at most one point (weight 0). After a box they are
            then untrained, which hardly affects a large model but does affect a small one.
        recompute: recompute full-resolution logits in the backward pass instead of storing them for every step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    focal: float = Field(20.0, ge=0)
    dice: float = Field(1.0, ge=0)
    iou: float = Field(1.0, ge=0)
    presence: float = Field(1.0, ge=0)
    focal_alpha: float = Field(0.25, ge=-1, le=1)
    focal_gamma: float = Field(2.0, ge=0)
    resolution: int | None = Field(None, ge=8)
    fallback: float = Field(0.0, ge=0)
    recompute: bool = True


@dataclass(frozen=True)
class Losses:
    """Scalar losses: the weighted sum, and each unweighted term for logging."""

    total: Tensor
    focal: Tensor
    dice: Tensor
    iou: Tensor
    presence: Tensor

    def report(self) -> dict[str, Tensor]:
        return {"loss": self.total, "focal": self.focal, "dice": self.dice, "iou": self.iou, "presence": self.presence}


def clip_loss(tracked: Sequence[TrackedFrame], masks: Tensor, settings: LossSettings, normaliser: Tensor) -> Losses:
    """Sum the loss over frames and correction steps, and divide it by `normaliser`.

    Frames with a mask prompt are left out: their output is the prompt itself.

    Args:
        masks: bool [N, T, S, S], the ground truth.
        normaliser: number of objects, averaged over ranks; at least 1 is used.
    """
    terms = masks.new_zeros(4, dtype=torch.float32)
    for frame in tracked:
        truth = masks[:, frame.frame]
        for step in frame.steps:
            if step.given_mask is None:
                terms = terms + _step_terms(step, truth, settings)
    focal, dice, iou, presence = (terms / normaliser.clamp(min=1)).unbind()
    total = settings.focal * focal + settings.dice * dice + settings.iou * iou + settings.presence * presence
    return Losses(total, focal.detach(), dice.detach(), iou.detach(), presence.detach())


def _step_terms(step: Decoded, truth: Tensor, settings: LossSettings) -> Tensor:
    """Return the terms of one step summed over objects, [focal, dice, iou, presence]."""
    present = truth.flatten(1).any(1).to(torch.float32)
    presence = F.binary_cross_entropy_with_logits(step.object_score[:, 0].float(), present, reduction="none")
    masked = _mask_terms(step.all_logits, step.ious, truth, present, settings)
    if settings.fallback and step.fallback is not None:
        masked = masked + settings.fallback * _mask_terms(*step.fallback, truth, present, settings)
    return torch.cat([masked, presence.sum()[None]])


def _mask_terms(logits: Tensor, ious: Tensor, truth: Tensor, present: Tensor, settings: LossSettings) -> Tensor:
    """Return [focal, dice, iou] summed over the present objects, of the candidate with the lowest weighted loss.

    The candidates are compared without gradients; only the terms of the best one are computed with gradients.
    """
    with torch.no_grad():
        full, target = _full_resolution(logits, truth, settings)
        actual = actual_iou(full, target)
        if several := logits.shape[1] > 1:
            focal, dice = _pixel_terms(full, target, settings)
            best = (settings.focal * focal + settings.dice * dice).argmin(1)
        del full, target
    best_logits = logits[torch.arange(len(logits), device=logits.device), best][:, None] if several else logits
    if settings.recompute and torch.is_grad_enabled():
        terms: Tensor = checkpoint(_focal_and_dice, best_logits, truth, settings, use_reentrant=False)
    else:
        terms = _focal_and_dice(best_logits, truth, settings)
    error = (ious.float() - actual).abs().mean(1)
    return (torch.cat([terms, error[None]]) * present).sum(1)


def _focal_and_dice(logits: Tensor, truth: Tensor, settings: LossSettings) -> Tensor:
    """Return [focal, dice] of each object, [2, N], from logits [N, 1, s, s] and truth bool [N, S, S]."""
    focal, dice = _pixel_terms(*_full_resolution(logits, truth, settings), settings)
    return torch.stack([focal[:, 0], dice[:, 0]])


def _full_resolution(logits: Tensor, truth: Tensor, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """Resize logits and truth to the side at which they are compared, [N, K, S, S] and [N, 1, S, S]."""
    side = settings.resolution or truth.shape[-1]
    logits = F.interpolate(logits.float(), (side, side), mode="bilinear", align_corners=False)
    target = truth[:, None].float()
    if side != truth.shape[-1]:
        target = (F.interpolate(target, (side, side), mode="bilinear", antialias=True) >= 0.5).float()
    return logits, target


def _pixel_terms(logits: Tensor, target: Tensor, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """Return focal loss and Dice loss of each candidate, [N, K] each."""
    return sigmoid_focal(logits, target, settings.focal_alpha, settings.focal_gamma), soft_dice(logits, target)


def sigmoid_focal(logits: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return the mean sigmoid focal loss over pixels, [N, K], from logits [N, K, S, S] and target [N, 1, S, S]."""
    target = target.expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if gamma:
        probability = logits.sigmoid()
        error = probability + target - 2 * probability * target
        entropy = entropy * error**gamma
    if alpha >= 0:
        entropy = entropy * (alpha * target + (1 - alpha) * (1 - target))
    return entropy.flatten(2).mean(2)


def soft_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Return the soft Dice loss 1 - (2 |P T| + 1) / (|P| + |T| + 1) of each candidate, [N, K]."""
    probability = logits.sigmoid().flatten(2)
    target = target.flatten(2)
    overlap = 2 * (probability * target).sum(2)
    return 1 - (overlap + 1) / (probability.sum(2) + target.sum(2) + 1)


def actual_iou(logits: Tensor, target: Tensor) -> Tensor:
    """Return the IoU of the thresholded masks with the truth, [N, K], without gradients."""
    predicted, truth = logits.detach().flatten(2) > 0, target.flatten(2) > 0.5
    overlap = (predicted & truth).sum(2).float()
    union = (predicted | truth).sum(2).float()
    return overlap / union.clamp(min=1)
