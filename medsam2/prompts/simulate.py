"""Prompts simulated from ground truth in training: initial mask, box or click, and correction clicks.

The procedure is SAM 2's (Ravi et al. 2024, arXiv 2408.00714, section 4 "training" and appendix D). Everything is
vectorised over objects and stays on the device; what a batch shares comes from `Draws(seed, step)`, what belongs
to an object from its own seed, so that ranks and batch sizes do not change an object's prompts.

Legend: N objects, T frames, S input side, P points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medsam2.prompts.kinds import NEGATIVE, PADDING, POSITIVE, Prompts
from medsam2.prompts.randomness import Draws, normal, uniform
from medsam2.prompts.settings import PromptSettings

TAG_BOX, TAG_CLICK, TAG_TRUTH, TAG_DAMAGE = 101, 211, 307, 401
DEPTH_KERNEL = 9


@dataclass(frozen=True)
class PromptPlan:
    """What a whole batch shares: the kind of the initial prompt, and which frames are prompted and corrected.

    `kind` is "mask", "box", "click", or "dense" (a damaged mask given to the decoder as low-resolution logits).
    """

    kind: str
    conditioning: tuple[int, ...]
    corrected: tuple[int, ...]
    corrections: int

    def order(self, num_frames: int) -> list[int]:
        """Conditioning frames first, then the others in time order."""
        return [*self.conditioning, *(t for t in range(num_frames) if t not in self.conditioning)]


def plan_prompts(settings: PromptSettings, draws: Draws, num_frames: int) -> PromptPlan:
    """Draw what the batch shares. The first frame is always a conditioning frame.

    With points, the conditioning frames are among the corrected ones, and up to `correction_frames` in all.
    A mask prompt that is taken as the output teaches nothing on its own frame, so that at least one frame of a clip
    is left to track, and on a still it is always dense.
    """
    kind = draws.choice(settings.kinds)
    if kind == "mask" and (draws.number() < settings.mask_damage or num_frames == 1):
        kind = "dense"
    others = list(range(1, num_frames))
    more = draws.integer(1, settings.conditioning_frames) - 1
    if kind == "mask":
        more = min(more, num_frames - 2)
    conditioning = [0, *draws.sample(others, more)]
    corrected: list[int] = []
    if kind != "mask" and settings.corrections and draws.number() < settings.correction_probability:
        rest = [t for t in others if t not in conditioning]
        wanted = draws.integer(1, max(settings.correction_frames, 1)) - len(conditioning)
        corrected = sorted(conditioning + draws.sample(rest, max(wanted, 0)))
    return PromptPlan(kind, tuple(conditioning), tuple(corrected), settings.corrections)


def initial_prompts(masks: Tensor, kind: str, seeds: Tensor, frame: int, settings: PromptSettings) -> Prompts:
    """Prompts of N objects on one frame: masks bool [N, S, S] -> `Prompts`.

    An object that is absent gets a padded box (no prompt) or a negative click somewhere.
    """
    tag = frame * 1000
    if kind == "mask":
        return Prompts(masks=masks[:, None])
    if kind == "box":
        return Prompts.from_boxes(jittered_boxes(masks, seeds, tag + TAG_BOX, settings)).hide_absent(masks)
    if kind == "click":
        present = masks.flatten(1).any(1)
        region = torch.where(present[:, None, None], masks, torch.ones_like(masks))
        points = click_inside(region, seeds, tag + TAG_CLICK, settings.click_candidates)
        labels = torch.where(present, POSITIVE, NEGATIVE).to(torch.int32)
        return Prompts(points=points[:, None], labels=labels[:, None])
    raise ValueError(f"unknown prompt kind {kind!r}; known: mask, box, click")


def dense_prompts(masks: Tensor, size: tuple[int, int], seeds: Tensor, frame: int) -> tuple[Prompts, Tensor]:
    """A damaged mask as the decoder's dense prompt: (empty points, logits [N, 1, 4h, 4w]).

    The mask is shifted, grown or shrunk, and holed by coarse noise: what a rough drawing or an earlier model gives.
    """
    count, tag = len(masks), frame * 1000 + TAG_DAMAGE
    numbers = uniform(seeds, tag, 3)
    low = F.interpolate(masks[:, None].float(), size, mode="bilinear", antialias=True)
    grown = F.max_pool2d(low, 3, 1, 1)
    shrunk = -F.max_pool2d(-low, 3, 1, 1)
    which = numbers[:, 0, None, None, None]
    low = torch.where(which < 0.35, grown, torch.where(which < 0.7, shrunk, low))
    noise = normal(seeds, tag + 1, 36).reshape(count, 1, 6, 6)
    noise = F.interpolate(noise, size, mode="bilinear", align_corners=False)
    flipped = (noise > 1.6 + numbers[:, 1, None, None, None]) & (F.max_pool2d(low, 7, 1, 3) > 0.5)
    low = torch.where(flipped, 1 - low, low)
    empty = Prompts(
        points=masks.new_zeros(count, 1, 2, dtype=torch.float32),
        labels=masks.new_full((count, 1), PADDING, dtype=torch.int32),
    )
    return empty, low * 20 - 10


def jittered_boxes(masks: Tensor, seeds: Tensor, tag: int, settings: PromptSettings) -> Tensor:
    """Tight boxes [N, 4] (x0, y0, x1, y1) with every side moved by normal noise, kept inside the image.

    The noise has `box_jitter` of the box's side as standard deviation and is cut at `box_jitter_limit` pixels.
    """
    boxes = tight_boxes(masks)
    side = boxes[:, 2:] - boxes[:, :2]
    scale = (side * settings.box_jitter).repeat(1, 2)
    noise = (normal(seeds, tag, 4) * scale).clamp(-settings.box_jitter_limit, settings.box_jitter_limit)
    return (boxes + noise).clamp(0, masks.shape[-1] - 1)


def tight_boxes(masks: Tensor) -> Tensor:
    """Boxes [N, 4] of masks bool [N, S, S]: (x0, y0, x1, y1), pixel indices of the outermost pixels, float."""
    rows, columns = masks.any(2), masks.any(1)
    size = masks.shape[-1]
    first = [m.float().argmax(1) for m in (columns, rows)]
    last = [size - 1 - m.flip(1).float().argmax(1) for m in (columns, rows)]
    return torch.stack([*first, *last], 1).float()


def click_inside(regions: Tensor, seeds: Tensor, tag: int, candidates: int = 1) -> Tensor:
    """One point [N, 2] (x, y) drawn uniformly in each region bool [N, S, S], or the deepest of several draws.

    Depth is the share of a 9 x 9 neighbourhood that lies in the region: people click well inside.
    """
    size = regions.shape[-1]
    flat = regions.flatten(1)
    cumulative = flat.float().cumsum(1)
    wanted = uniform(seeds, tag, candidates) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, wanted, right=True).clamp(max=flat.shape[1] - 1)
    if candidates > 1:
        padding = DEPTH_KERNEL // 2
        depth = F.avg_pool2d(regions[:, None].float(), DEPTH_KERNEL, 1, padding).flatten(1)
        depth = F.avg_pool2d(depth.reshape(-1, 1, size, size), DEPTH_KERNEL, 1, padding).flatten(1)
        index = index.gather(1, depth.gather(1, index).argmax(1, keepdim=True))
    index = index[:, 0]
    return torch.stack([index % size, torch.div(index, size, rounding_mode="floor")], 1).float()


def correction_click(
    predicted: Tensor, truth: Tensor, seeds: Tensor, frame: int, step: int, settings: PromptSettings
) -> tuple[Tensor, Tensor]:
    """The next click: points [N, 1, 2], labels [N, 1], from predicted and true masks bool [N, S, S].

    Uniform in the error region (positive on what is missed, negative on what is too much) or, with probability
    `from_truth`, in the ground truth. Where there is no error: a negative click in the background.
    """
    tag = frame * 1000 + 10 * (step + 1)
    wrong = predicted ^ truth
    none_wrong = ~wrong.flatten(1).any(1)
    region = torch.where(none_wrong[:, None, None], ~(predicted | truth), wrong)
    use_truth = (uniform(seeds, tag + TAG_TRUTH)[:, 0] < settings.from_truth) & truth.flatten(1).any(1)
    region = torch.where(use_truth[:, None, None], truth, region)
    points = click_inside(region, seeds, tag + TAG_CLICK)
    index = (points[:, 1] * truth.shape[-1] + points[:, 0]).long()
    labels = truth.flatten(1).gather(1, index[:, None]).to(torch.int32)
    return points[:, None], labels
