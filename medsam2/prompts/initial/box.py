"""The object's mask itself, and its box, drawn as imprecisely as the recipe says."""

from __future__ import annotations

import torch
from torch import Tensor

from medsam2.prompts.initial import initial_kind
from medsam2.prompts.kinds import Prompts
from medsam2.prompts.randomness import RandomStream
from medsam2.prompts.regions import tight_boxes
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import BoxSettings, PromptSettings

GROWTH_GRID_PIXELS = 256.0  # side of the input in whose pixels `box.grow` is given
MAX_JITTER_PIXELS = 20.0  # as in Meta's training code


@initial_kind
def mask(scene: Scene, settings: PromptSettings) -> Prompts:
    """The ground truth, taken as the frame's output (SAM 2's semi-supervised video task)."""
    return Prompts(masks=scene.masks[:, None])


@initial_kind
def box(scene: Scene, settings: PromptSettings) -> Prompts:
    """The box; none where the object is absent."""
    return Prompts.from_boxes(jittered_boxes(scene, settings.box)).hide_absent(scene.masks)


def jittered_boxes(scene: Scene, settings: BoxSettings, limit: float = MAX_JITTER_PIXELS) -> Tensor:
    """Boxes [N, 4] (x0, y0, x1, y1) of a scene's objects: scaled, grown, jittered, then kept inside the image.

    Args:
        limit: the jitter of a side is at most so many pixels.
    """
    tight = tight_boxes(scene.masks)
    sides = tight[:, 2:] - tight[:, :2]
    reach = 0.5 * settings.scale * scene.normal(RandomStream.BOX_SCALE, 2) * sides
    growth = scene.uniform(RandomStream.BOX_GROWTH, 4) * (settings.grow * scene.size / GROWTH_GRID_PIXELS)
    boxes = tight + torch.cat([-reach, reach], 1)
    boxes = boxes + torch.cat([-growth[:, :2], growth[:, 2:]], 1)
    return (boxes + _jitter(scene, (sides * settings.jitter).repeat(1, 2), settings, limit)).clamp(0, scene.size - 1)


def _jitter(scene: Scene, scale: Tensor, settings: BoxSettings, limit: float) -> Tensor:
    """Noise [N, 4] of the given scale, at most `limit` pixels.

    The uniform law is scaled to the limit rather than cut at it, as in Meta's training code.
    """
    if settings.jitter_law == "normal":
        return (scene.normal(RandomStream.BOX_JITTER, 4) * scale).clamp(-limit, limit)
    return ((scene.uniform(RandomStream.BOX_JITTER, 4) * 2 - 1) * scale.clamp(max=limit)).clamp(-limit, limit)
