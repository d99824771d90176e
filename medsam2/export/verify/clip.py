"""The clip on which an export is compared with its checkpoint.

Legend: T frames, C channels, H and W pixels of the clip, S the model's side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from medsam2.errors import UserError, did_you_mean
from medsam2.inference.predictor import FramePrompt
from medsam2.pixels import resize
from medsam2.prompts.evaluation import tight_box

LARGE_SIDE = 512  # px; models above it are slow on a CPU, so that their clip is shorter
FRAMES, LARGE_MODEL_FRAMES = 10, 5


@dataclass(frozen=True, eq=False)
class ReferenceClip:
    """What both programs are run on.

    Attributes:
        frames: uint8 [T, C, H, W], C = 1 or 3.
        prompts: one box an object, all on the same frame.
        name: for the report.
    """

    frames: Tensor
    prompts: tuple[FramePrompt, ...]
    name: str


def reference_clip(case: str | ReferenceClip | None, side: int) -> ReferenceClip:
    """The clip that `case` names ("SHARDS" or "SHARDS:KEY"); None generates one.

    Args:
        side: of the model's input, px.
    """
    if isinstance(case, ReferenceClip):
        return case
    return clip_of_case(case) if case else generated_clip(FRAMES if side <= LARGE_SIDE else LARGE_MODEL_FRAMES)


def generated_clip(length: int = FRAMES, side: int = 160) -> ReferenceClip:
    """Two blobs that move over noise, one bright and one dark, both boxed on the middle frame."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    frames = np.repeat(generator.normal(100, 12, (1, side, side)), length, 0)
    prompt_frame, prompts = length // 2, []
    for index, (column, row, radius, change) in enumerate([(0.3, 0.4, 0.15, 70), (0.7, 0.55, 0.12, -60)]):
        for t in range(length):
            inside = (x - column - 0.008 * t) ** 2 + (y - row + 0.006 * t) ** 2 < radius**2
            frames[t][inside] += change
            if t == prompt_frame:
                prompts.append(FramePrompt(t, index, box=tight_box(inside)))
    values = torch.from_numpy(frames.clip(0, 255).astype(np.uint8))[:, None]
    return ReferenceClip(values, tuple(prompts), f"a generated clip of {length} frames")


def clip_of_case(case: str) -> ReferenceClip:
    """The first held-out segment of a shard folder ("SHARDS"), or the one with a given key ("SHARDS:KEY").

    Its largest object gets a tight box on the slice where it is largest.

    Raises:
        UserError: no such folder or key, or a segment without objects.
    """
    from medsam2.data.plan.stream import PlanEntry
    from medsam2.data.read.catalog import Catalog
    from medsam2.data.read.reader import BatchReader

    folder, _, key = case.partition(":")
    catalog = Catalog(folder)
    keys = [catalog.text("key", row) for row in range(len(catalog))]
    if key and key not in keys:
        raise UserError(f"--case: {folder} has no segment {key!r}.{did_you_mean(key, keys)}")
    held_out = [row for row in range(len(catalog)) if catalog.text("split", row) != "train"]
    row = keys.index(key) if key else (held_out or [0])[0]
    sizes = catalog.objects(row).pixels.max(1, initial=0)
    if not sizes.size or not sizes.max():
        raise UserError(f"--case: the segment {keys[row]} of {folder} has no object; name another one (SHARDS:KEY).")
    frames = tuple(range(catalog.num_frames(row)))
    entry = PlanEntry(0, row, frames, (int(sizes.argmax()),), seed=0, position=0)
    batch = BatchReader([catalog], None).read([entry], 0)
    mask = batch.masks[0].numpy()
    frame = int(mask.sum((1, 2)).argmax())
    prompt = FramePrompt(frame, 0, box=tight_box(mask[frame]))
    return ReferenceClip(batch.frames[0], (prompt,), f"{keys[row]} ({batch.names[0]})")


def at_model_side(clip: ReferenceClip, side: int) -> ReferenceClip:
    """The clip as RGB frames uint8 [T, 3, S, S], its boxes scaled along."""
    height, width = clip.frames.shape[-2:]
    frames = (resize(clip.frames, side) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    scale = np.asarray([side / width, side / height] * 2)
    prompts = []
    for prompt in clip.prompts:
        assert prompt.box is not None, "reference clips are boxed"
        x0, y0, x1, y1 = (float(value) for value in np.asarray(prompt.box) * scale)
        prompts.append(replace(prompt, box=(x0, y0, x1, y1)))
    return ReferenceClip(frames, tuple(prompts), clip.name)
