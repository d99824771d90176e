"""Simulation of prompts from ground truth in training: the plan of a batch, initial prompts and correction clicks.

The procedure is that of SAM 2 (Ravi et al. 2024, arXiv 2408.00714, section 4 "training" and appendix D). All functions
are vectorised over objects and stay on the device. Random numbers that a batch shares come from `Draws(seed, step)`,
those of an object from its seed, so that the number of ranks and the batch size do not change an object's prompts.

Legend: N objects, T frames, S input side, P points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medsam2.prompts.initial import INITIAL_KINDS
from medsam2.prompts.kinds import PADDING, Prompts
from medsam2.prompts.randomness import Draws, RandomStream, normal, uniform
from medsam2.prompts.regions import click_inside
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import PromptSettings

MASK, DENSE = "mask", "dense"


@dataclass(frozen=True)
class PromptPlan:
    """The kind of the initial prompts and the frames that are prompted and corrected, shared by a batch.

    Attributes:
        kind: a kind of `INITIAL_KINDS`, or "dense" (a damaged mask as the decoder's low-resolution logits).
        conditioning: indices of the prompted frames; the first one is processed first.
        corrected: indices of the frames with correction clicks. corrections: clicks per such frame.
    """

    kind: str
    conditioning: tuple[int, ...]
    corrected: tuple[int, ...]
    corrections: int

    def order(self, num_frames: int) -> list[int]:
        """Return the order of frames: conditioning frames, then forward and then backward from the first of them."""
        first = self.conditioning[0]
        rest = [*range(first + 1, num_frames), *range(first - 1, -1, -1)]
        return [*self.conditioning, *(t for t in rest if t not in self.conditioning)]

    def reverse(self, frame: int) -> bool:
        """Return whether a frame is tracked backward in time: those before the first prompt, as in inference."""
        return frame < self.conditioning[0]

    def is_conditioning(self, frame: int, settings: PromptSettings) -> bool:
        """Return whether a frame enters the memory as a conditioning frame."""
        return frame in self.conditioning or (settings.corrected_as_conditioning and frame in self.corrected)


def plan_prompts(settings: PromptSettings, draws: Draws, num_frames: int, first: int = 0) -> PromptPlan:
    """Draw the plan of a batch.

    Corrected frames include all conditioning frames; there are up to `correction_frames` of them. A mask prompt is the
    output of its frame, which gives no training signal. Therefore at least one frame of a clip stays without a mask
    prompt, and the mask prompt of a still is always dense.

    Args:
        first: the frame on which all objects are present; it is always a conditioning frame.
    """
    kind = draws.choice(settings.kinds_for(num_frames))
    if kind == MASK and (draws.number() < settings.mask_damage or num_frames == 1):
        kind = DENSE
    others = [t for t in range(num_frames) if t != first]
    num_added = draws.integer(1, settings.conditioning_frames) - 1
    if kind == MASK:
        num_added = min(num_added, num_frames - 2)
    conditioning = [first, *draws.sample(others, num_added)]
    corrected: list[int] = []
    if kind != MASK and settings.corrections and draws.number() < settings.correction_probability:
        rest = [t for t in others if t not in conditioning]
        num_added = draws.integer(1, max(settings.correction_frames, 1)) - len(conditioning)
        corrected = sorted(conditioning + draws.sample(rest, max(num_added, 0)))
    return PromptPlan(kind, tuple(conditioning), tuple(corrected), settings.corrections)


def initial_prompts(
    masks: Tensor, kind: str, seeds: Tensor, frame: int, settings: PromptSettings, others: Tensor | None = None
) -> Prompts:
    """Simulate the initial prompts of N objects on one frame.

    An absent object gets padding (no prompt) or, from kinds with clicks, a negative click anywhere.

    Args:
        masks: bool [N, S, S]. kind: a kind of `INITIAL_KINDS`. seeds: int64 [N].
        others: bool [N, S, S], the pixels of the clip's other objects (`scene.other_objects`), on which negative
            points may lie.
    """
    return INITIAL_KINDS[kind](Scene(masks, seeds, frame, others), settings)


def dense_prompts(masks: Tensor, size: tuple[int, int], seeds: Tensor, frame: int) -> tuple[Prompts, Tensor]:
    """Simulate dense prompts of masks bool [N, S, S]: padding points, and logits [N, 1, *size] of damaged masks.

    Masks are grown, shrunk or unchanged, and coarse noise makes holes in them and spots beside them, as in a rough
    drawing or in the output of another model.
    """
    count = len(masks)
    numbers = uniform(seeds, RandomStream.MASK_DAMAGE, 3, frame)
    low = F.interpolate(masks[:, None].float(), size, mode="bilinear", antialias=True)
    grown = F.max_pool2d(low, 3, 1, 1)
    shrunk = -F.max_pool2d(-low, 3, 1, 1)
    change = numbers[:, 0, None, None, None]
    low = torch.where(change < 0.35, grown, torch.where(change < 0.7, shrunk, low))
    noise = normal(seeds, RandomStream.MASK_HOLES, 36, frame).reshape(count, 1, 6, 6)
    noise = F.interpolate(noise, size, mode="bilinear", align_corners=False)
    flipped = (noise > 1.6 + numbers[:, 1, None, None, None]) & (F.max_pool2d(low, 7, 1, 3) > 0.5)
    low = torch.where(flipped, 1 - low, low)
    empty = Prompts(
        points=masks.new_zeros(count, 1, 2, dtype=torch.float32),
        labels=masks.new_full((count, 1), PADDING, dtype=torch.int32),
    )
    return empty, low * 20 - 10


def correction_click(
    predicted: Tensor, truth: Tensor, seeds: Tensor, frame: int, step: int, settings: PromptSettings
) -> tuple[Tensor, Tensor]:
    """Draw a correction click: points [N, 1, 2] and labels [N, 1] from predicted and true masks bool [N, S, S].

    The click is uniform in the error (positive where the object is missed, negative elsewhere) or, with probability
    `from_truth`, in the ground truth. Without an error, it is a negative click in the background.

    Args:
        seeds: int64 [N]. step: 0 for the first correction of a frame.
    """
    error = predicted ^ truth
    is_correct = ~error.flatten(1).any(1)
    region = torch.where(is_correct[:, None, None], ~(predicted | truth), error)
    from_truth = uniform(seeds, RandomStream.CORRECTION_FROM_TRUTH, 1, frame, step + 1)[:, 0] < settings.from_truth
    use_truth = from_truth & truth.flatten(1).any(1)
    region = torch.where(use_truth[:, None, None], truth, region)
    points = click_inside(region, uniform(seeds, RandomStream.CLICK, 1, frame, step + 1))
    index = (points[:, 1] * truth.shape[-1] + points[:, 0]).long()
    labels = truth.flatten(1).gather(1, index[:, None]).to(torch.int32)
    return points[:, None], labels
