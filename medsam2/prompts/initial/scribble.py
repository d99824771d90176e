"""A scribble: positive points along a smooth random curve that stays inside the object.

Several curves are drawn through one point well inside, each followed both ways until it leaves the object; the one
that got farthest is kept, as a hand follows an elongated structure rather than crossing it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medsam2.prompts.initial import initial_kind
from medsam2.prompts.kinds import PADDING, POSITIVE, Prompts
from medsam2.prompts.randomness import RandomStream
from medsam2.prompts.regions import click_inside, lookup, tight_boxes
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import PromptSettings, ScribbleSettings

POINTS = 6  # along a scribble
CURVES = 8
STEPS = 48  # of a curve, each way
BENDS = 3  # waves of the heading, each with its own strength
START_CANDIDATES = 4


@initial_kind
def scribble(scene: Scene, settings: PromptSettings) -> Prompts:
    """Points [N, 6, 2], evenly spaced along the curve; padding where the object is absent."""
    start = click_inside(scene.clickable, scene.uniform(RandomStream.SCRIBBLE_START, START_CANDIDATES))
    curves = start[:, None, None] + random_curves(scene, settings.scribble)
    inside = lookup(scene.masks, curves)
    # the middle of a curve is the starting point: count the steps until each half leaves the object
    back = inside[..., :STEPS].flip(-1).long().cumprod(-1).sum(-1)
    forth = inside[..., STEPS + 1 :].long().cumprod(-1).sum(-1)
    best = (back + forth).argmax(1, keepdim=True)
    back, forth = back.gather(1, best), forth.gather(1, best)
    shares = torch.linspace(0, 1, POINTS, device=start.device)
    steps = (STEPS - back + (shares * (back + forth)).round().long())[..., None].expand(-1, -1, 2)
    longest = curves.gather(1, best[..., None, None].expand(-1, 1, *curves.shape[2:]))[:, 0]
    points = longest.gather(1, steps).round()
    labels = torch.where(scene.present, POSITIVE, PADDING).to(torch.int32)
    return Prompts(points=points, labels=labels[:, None].expand(-1, POINTS))


def random_curves(scene: Scene, settings: ScribbleSettings) -> Tensor:
    """Smooth curves through the origin, float [N, CURVES, 2 * STEPS + 1, 2] in pixels.

    Their heading is a random one plus slow waves; their length each way is `settings.length` of the object's diagonal.
    """
    number = len(scene.masks)
    boxes = tight_boxes(scene.masks)
    diagonal = (boxes[:, 2:] - boxes[:, :2]).norm(dim=1)
    place = torch.arange(-STEPS, STEPS + 1, device=diagonal.device) / STEPS
    heading = scene.uniform(RandomStream.SCRIBBLE_HEADING, CURVES) * 2 * math.pi
    bends = scene.normal(RandomStream.SCRIBBLE_BENDS, CURVES * BENDS).reshape(number, CURVES, BENDS, 1)
    waves = torch.stack([torch.sin(place * math.pi * (k + 1) / 2) / (k + 1) for k in range(BENDS)])
    angle = heading[..., None] + settings.bend * (bends * waves).sum(2)
    steps = torch.stack([angle.cos(), angle.sin()], -1)
    path = steps.cumsum(2)
    path = path - path[:, :, STEPS : STEPS + 1]
    return path * (diagonal * settings.length / STEPS)[:, None, None, None]
