"""One training clip through the tracker: prompts simulated, memory carried, corrections looped.

Order of frames and feeding of corrections as in SAM 2's training (Ravi et al. 2024, arXiv 2408.00714, appendix D).

Legend: N objects, T frames, S input side.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from medsam2.model.memory import MemoryBank
from medsam2.model.tracker import Decoded, Features, TrackedFrame, Tracker
from medsam2.prompts.kinds import Prompts
from medsam2.prompts.settings import PromptSettings
from medsam2.prompts.simulate import PromptPlan, correction_click, dense_prompts, initial_prompts


def rollout(
    tracker: Tracker,
    features: Features,
    masks: Tensor,
    object_to_clip: Tensor,
    seeds: Tensor,
    plan: PromptPlan,
    settings: PromptSettings,
) -> list[TrackedFrame]:
    """Track N objects through clips of T frames.

    Args:
        features: of all frames, clip-major: frame t of clip b is row b * T + t.
        masks: bool [N, T, S, S] ground truth at the model's input size.
        object_to_clip: int64 [N]. seeds: int64 [N], one an object.

    Returns:
        one `TrackedFrame` a frame, in the order in which they were processed.
    """
    bank = MemoryBank()
    num_frames = masks.shape[1]
    tracked = []
    order = plan.order(num_frames)
    for place, frame in enumerate(order):
        here = features.select(object_to_clip * num_frames + frame)
        conditioning = frame in plan.conditioning
        steps = _segment_frame(tracker, here, bank, frame, masks[:, frame], seeds, plan, settings, num_frames)
        if place + 1 < len(order):
            bank.add(frame, tracker.memorise(here, steps[-1]), conditioning)
        tracked.append(TrackedFrame(frame, tuple(steps), conditioning))
    return tracked


def _segment_frame(
    tracker: Tracker,
    here: Features,
    bank: MemoryBank,
    frame: int,
    truth: Tensor,
    seeds: Tensor,
    plan: PromptPlan,
    settings: PromptSettings,
    num_frames: int,
) -> list[Decoded]:
    """The initial decoding of one frame and its correction clicks; conditioning frames ignore the memory."""
    conditioning = frame in plan.conditioning
    prompts: Prompts | None = None
    previous: Tensor | None = None
    if conditioning and plan.kind == "dense":
        size = tracker.sam.sam_prompt_encoder.mask_input_size
        prompts, previous = dense_prompts(truth, size, seeds, frame)
    elif conditioning:
        prompts = initial_prompts(truth, plan.kind, seeds, frame, settings)
    segment = partial(tracker.segment, num_frames=num_frames, initial=conditioning)
    steps = [segment(here, bank, frame, prompts, previous)]
    for step in range(plan.corrections if frame in plan.corrected else 0):
        last = steps[-1].logits.detach()
        size = truth.shape[-2:]
        predicted = F.interpolate(last, size, mode="bilinear", align_corners=False)[:, 0] > 0
        points, labels = correction_click(predicted, truth, seeds, frame, step, settings)
        prompts = Prompts(points, labels) if prompts is None else prompts.with_points(points, labels)
        steps.append(segment(here, bank, frame, prompts, steps[-1].logits))
    return steps


def count_correct_presence(tracked: list[TrackedFrame], masks: Tensor) -> Tensor:
    """Share of object-frames whose presence is predicted rightly (a log figure), scalar."""
    right = [((f.final.object_score[:, 0] > 0) == masks[:, f.frame].flatten(1).any(1)).float() for f in tracked]
    return torch.stack(right).mean()
