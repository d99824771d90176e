"""Track training clips: simulate prompts, pass memory from frame to frame, add correction clicks.

The order of frames and the use of corrections follow SAM 2's training (Ravi et al. 2024, arXiv 2408.00714, app. D).

Legend: N objects, T frames, S input side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from medsam2.model.memory_bank import MemoryBank
from medsam2.model.tracker import Decoded, Features, TrackedFrame, Tracker
from medsam2.prompts.kinds import Prompts
from medsam2.prompts.scene import other_objects
from medsam2.prompts.settings import PromptSettings
from medsam2.prompts.simulate import DENSE, PromptPlan, correction_click, dense_prompts, initial_prompts


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
        object_to_clip: int64 [N]. seeds: int64 [N], one per object.

    Returns:
        one `TrackedFrame` per frame, in the order in which the frames were processed.
    """
    bank = MemoryBank()
    num_frames = masks.shape[1]
    clips = _Clips(masks, object_to_clip, len(features.embed) // num_frames, seeds, plan, settings)
    tracked = []
    order = plan.order(num_frames)
    by_time = features.by_time(num_frames)
    for frame in order:
        frame_features = by_time[frame].select(object_to_clip)
        steps = _segment_frame(tracker, frame_features, bank, clips, frame)
        if frame != order[-1]:
            memory = tracker.memorise(frame_features, steps[-1])
            tracker.clip_policy.admit(bank, frame, memory, plan.is_conditioning(frame, settings))
        tracked.append(TrackedFrame(frame, tuple(steps), frame in plan.conditioning))
    return tracked


@dataclass(frozen=True, eq=False)
class _Clips:
    """Inputs of the prompt simulation: the arguments of `rollout`, and the number of clips."""

    masks: Tensor
    object_to_clip: Tensor
    count: int
    seeds: Tensor
    plan: PromptPlan
    settings: PromptSettings


def _segment_frame(tracker: Tracker, features: Features, bank: MemoryBank, clips: _Clips, frame: int) -> list[Decoded]:
    """Decode one frame, then once more per correction click; conditioning frames ignore the memory."""
    plan, truth = clips.plan, clips.masks[:, frame]
    conditioning = frame in plan.conditioning
    prompts, previous = _prompt_frame(tracker, clips, frame) if conditioning else (None, None)
    conditioned = tracker.condition(features, bank, frame, plan.reverse(frame), clips.masks.shape[1], conditioning)
    segment = partial(tracker.segment, features, bank, frame, initial=conditioning, conditioned=conditioned)
    steps = [segment(prompts, previous)]
    for step in range(plan.corrections if frame in plan.corrected else 0):
        last = steps[-1].logits.detach()
        predicted = F.interpolate(last, truth.shape[-2:], mode="bilinear", align_corners=False)[:, 0] > 0
        points, labels = correction_click(predicted, truth, clips.seeds, frame, step, clips.settings)
        prompts = Prompts(points, labels) if prompts is None else prompts.with_points(points, labels)
        steps.append(segment(prompts, steps[-1].logits))
    return steps


def _prompt_frame(tracker: Tracker, clips: _Clips, frame: int) -> tuple[Prompts, Tensor | None]:
    """Simulate the prompts of a conditioning frame, and its dense prompt if the plan has one."""
    truth = clips.masks[:, frame]
    if clips.plan.kind == DENSE:
        return dense_prompts(truth, tracker.sam.sam_prompt_encoder.mask_input_size, clips.seeds, frame)
    others = other_objects(truth, clips.object_to_clip, clips.count)
    return initial_prompts(truth, clips.plan.kind, clips.seeds, frame, clips.settings, others), None


def count_correct_presence(tracked: list[TrackedFrame], masks: Tensor) -> Tensor:
    """Return the share of object-frames whose presence is predicted correctly, a scalar for logging."""
    right = [((f.final.object_score[:, 0] > 0) == masks[:, f.frame].flatten(1).any(1)).float() for f in tracked]
    return torch.stack(right).mean()
