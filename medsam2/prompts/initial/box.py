"""The object's box, drawn as imprecisely as the recipe says; none where the object is absent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from medsam2.prompts.kinds import Prompts
from medsam2.prompts.randomness import normal, uniform
from medsam2.prompts.regions import tight_boxes
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import PromptSettings

NAME = "box"
TAG_BOX, TAG_SCALE, TAG_GROW = 101, 643, 644
GROW_GRID = 256.0


def _symmetric(seeds: Tensor, tag: int, count: int) -> Tensor:
    """Uniform in [-1, 1)."""
    return uniform(seeds, tag, count) * 2 - 1


LAWS: dict[str, Callable[[Tensor, int, int], Tensor]] = {"normal": normal, "uniform": _symmetric}


def simulate(scene: Scene, settings: PromptSettings) -> Prompts:
    boxes = jittered_boxes(scene.masks, scene.seeds, scene.tag(TAG_BOX), settings)
    return Prompts.from_boxes(boxes).hide_absent(scene.masks)


def jittered_boxes(masks: Tensor, seeds: Tensor, tag: int, settings: PromptSettings) -> Tensor:
    """Boxes [N, 4] (x0, y0, x1, y1) of masks bool [N, S, S]: scaled, grown, jittered, then kept inside the image."""
    size = masks.shape[-1]
    tight = tight_boxes(masks)
    boxes = _scaled(tight, normal(seeds, tag - TAG_BOX + TAG_SCALE, 2), settings.box_scale)
    grown = uniform(seeds, tag - TAG_BOX + TAG_GROW, 4) * (settings.box_grow * size / GROW_GRID)
    boxes = boxes + torch.cat([-grown[:, :2], grown[:, 2:]], 1)
    limit = settings.box_jitter_limit
    scale = ((tight[:, 2:] - tight[:, :2]) * settings.box_jitter).repeat(1, 2)
    return (boxes + _noise(seeds, tag, scale, limit, settings.box_jitter_law)).clamp(0, size - 1)


def _scaled(boxes: Tensor, numbers: Tensor, share: float) -> Tensor:
    """Boxes whose width and height become 1 + share * number of what they were, about the same centre."""
    reach = 0.5 * share * numbers * (boxes[:, 2:] - boxes[:, :2])
    return boxes + torch.cat([-reach, reach], 1)


def _noise(seeds: Tensor, tag: int, scale: Tensor, limit: float, law: str) -> Tensor:
    """Noise [N, 4] of the given scale, at most `limit` pixels.

    A uniform law is scaled to the limit rather than cut at it, as in Meta's training code.
    """
    if law == "uniform":
        scale = scale.clamp(max=limit)
    return (LAWS[law](seeds, tag, 4) * scale).clamp(-limit, limit)
