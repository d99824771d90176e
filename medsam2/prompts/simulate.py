"""Prompts simulated from ground truth in training: the plan of a batch, initial prompts and correction clicks.

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

from medsam2.prompts.initial import INITIAL_KINDS
from medsam2.prompts.kinds import PADDING, Prompts
from medsam2.prompts.randomness import Draws, RandomStream, normal, uniform
from medsam2.prompts.regions import click_inside
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import PromptSettings

MASK, DENSE = "mask", "dense"


@dataclass(frozen=True)
class PromptPlan:
    """What a whole batch shares: the kind of the initial prompt, and which frames are prompted and corrected.

    Attributes:
        kind: a kind of `INITIAL_KINDS`, or "dense" (a damaged mask given to the decoder as low-resolution logits).
        conditioning: the prompted frames, first the one that is visited first.
        corrected: frames that receive correction clicks. corrections: how many each.
    """

    kind: str
    conditioning: tuple[int, ...]
    corrected: tuple[int, ...]
    corrections: int

    def order(self, num_frames: int) -> list[int]:
        """Conditioning frames first, then those after the first prompt forwards, then those before it backwards."""
        first = self.conditioning[0]
        rest = [*range(first + 1, num_frames), *range(first - 1, -1, -1)]
        return [*self.conditioning, *(t for t in rest if t not in self.conditioning)]

    def reverse(self, frame: int) -> bool:
        """Whether a frame is tracked backwards in time, as those before the first prompt are in inference too."""
        return frame < self.conditioning[0]

    def remembered_as_prompted(self, frame: int, settings: PromptSettings) -> bool:
        """Whether a frame enters the memory as a conditioning frame."""
        return frame in self.conditioning or (settings.corrected_as_conditioning and frame in self.corrected)


def plan_prompts(settings: PromptSettings, draws: Draws, num_frames: int, first: int = 0) -> PromptPlan:
    """Draw what the batch shares. The frame `first`, where all objects are present, is always a conditioning frame.

    With points, the conditioning frames are among the corrected ones, and up to `correction_frames` in all.
    A mask prompt that is taken as the output teaches nothing on its own frame, so that at least one frame of a clip
    is left to track, and on a still it is always dense.
    """
    kind = draws.choice(settings.kinds_for(num_frames))
    if kind == MASK and (draws.number() < settings.mask_damage or num_frames == 1):
        kind = DENSE
    others = [t for t in range(num_frames) if t != first]
    more = draws.integer(1, settings.conditioning_frames) - 1
    if kind == MASK:
        more = min(more, num_frames - 2)
    conditioning = [first, *draws.sample(others, more)]
    corrected: list[int] = []
    if kind != MASK and settings.corrections and draws.number() < settings.correction_probability:
        rest = [t for t in others if t not in conditioning]
        wanted = draws.integer(1, max(settings.correction_frames, 1)) - len(conditioning)
        corrected = sorted(conditioning + draws.sample(rest, max(wanted, 0)))
    return PromptPlan(kind, tuple(conditioning), tuple(corrected), settings.corrections)


def initial_prompts(
    masks: Tensor, kind: str, seeds: Tensor, frame: int, settings: PromptSettings, others: Tensor | None = None
) -> Prompts:
    """Prompts of N objects on one frame: masks bool [N, S, S] -> `Prompts`.

    Args:
        others: bool [N, S, S], the pixels of the clip's other objects (`scene.other_objects`), on which negative
            points may lie.

    An object that is absent gets padding (no prompt) or, where a click was due, a negative click somewhere.
    """
    return INITIAL_KINDS[kind](Scene(masks, seeds, frame, others), settings)


def dense_prompts(masks: Tensor, size: tuple[int, int], seeds: Tensor, frame: int) -> tuple[Prompts, Tensor]:
    """A damaged mask as the decoder's dense prompt: (empty points, logits [N, 1, 4h, 4w]).

    The mask is shifted, grown or shrunk, and holed by coarse noise: what a rough drawing or an earlier model gives.
    """
    count = len(masks)
    numbers = uniform(seeds, RandomStream.MASK_DAMAGE, 3, frame)
    low = F.interpolate(masks[:, None].float(), size, mode="bilinear", antialias=True)
    grown = F.max_pool2d(low, 3, 1, 1)
    shrunk = -F.max_pool2d(-low, 3, 1, 1)
    which = numbers[:, 0, None, None, None]
    low = torch.where(which < 0.35, grown, torch.where(which < 0.7, shrunk, low))
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
    """The next click: points [N, 1, 2], labels [N, 1], from predicted and true masks bool [N, S, S].

    Uniform in the error region (positive on what is missed, negative on what is too much) or, with probability
    `from_truth`, in the ground truth. Where there is no error: a negative click in the background.
    """
    wrong = predicted ^ truth
    none_wrong = ~wrong.flatten(1).any(1)
    region = torch.where(none_wrong[:, None, None], ~(predicted | truth), wrong)
    from_truth = uniform(seeds, RandomStream.CORRECTION_FROM_TRUTH, 1, frame, step + 1)[:, 0] < settings.from_truth
    use_truth = from_truth & truth.flatten(1).any(1)
    region = torch.where(use_truth[:, None, None], truth, region)
    points = click_inside(region, uniform(seeds, RandomStream.CLICK, 1, frame, step + 1))
    index = (points[:, 1] * truth.shape[-1] + points[:, 0]).long()
    labels = truth.flatten(1).gather(1, index[:, None]).to(torch.int32)
    return points[:, None], labels
