"""The RECIST line, the two ends of the object's longest diameter and its middle, and the square box around it.

RECIST 1.1 (Eisenhauer et al. 2009, Eur J Cancer 45:228-247) measures a lesion by its longest diameter on one slice;
public lesion sets carry that line and nothing else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medsam2.prompts.initial import initial_kind
from medsam2.prompts.kinds import PADDING, POSITIVE, Prompts
from medsam2.prompts.randomness import RandomStream
from medsam2.prompts.regions import lookup, row_ends
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import PromptSettings

DIRECTIONS = 64  # the longest diameter is missed by at most 1 - cos(pi / 128), 0.03 %


@initial_kind
def recist(scene: Scene, settings: PromptSettings) -> Prompts:
    """Points [N, 3, 2]: both ends, then the middle of the line.

    Ends that the jitter moved off the object stay where they were; a middle that lies off the object (which may be
    bent) is padding, since a positive label would be wrong there.
    """
    ends = drawn_line(scene, settings.recist.jitter)
    points = torch.cat([ends, torch.lerp(ends[:, 0], ends[:, 1], 0.5)[:, None]], 1)
    labels = torch.where(lookup(scene.masks, points), POSITIVE, PADDING).to(torch.int32)
    return Prompts(points=points, labels=labels)


@initial_kind
def recist_box(scene: Scene, settings: PromptSettings) -> Prompts:
    """The square box centred on the line, its side the line's length (lesions without a mask)."""
    ends = drawn_line(scene, settings.recist.jitter)
    centre = ends.mean(1)
    reach = 0.5 * (ends[:, 1] - ends[:, 0]).norm(dim=1, keepdim=True)
    boxes = torch.cat([centre - reach, centre + reach], 1).clamp(0, scene.size - 1)
    return Prompts.from_boxes(boxes).hide_absent(scene.masks)


def drawn_line(scene: Scene, jitter: float) -> Tensor:
    """The line as a reader draws it, float [N, 2, 2]: ends moved by normal noise, a share of the line's length."""
    ends = longest_diameter(scene.masks)
    length = (ends[:, 1] - ends[:, 0]).norm(dim=1)[:, None, None]
    noise = scene.normal(RandomStream.RECIST_ENDS, 4).reshape(-1, 2, 2)
    moved = ends + noise * length * jitter
    return torch.where(lookup(scene.masks, moved)[..., None], moved, ends)


def longest_diameter(masks: Tensor) -> Tensor:
    """Both ends (x, y) of the longest line between two pixels of each mask bool [N, S, S]: float [N, 2, 2].

    The farthest pixels along each of 64 directions are compared. An empty mask gives some finite line.
    """
    points, valid = row_ends(masks)
    angles = [math.pi * k / DIRECTIONS for k in range(DIRECTIONS)]
    pairs = torch.stack([_farthest(points, valid, math.cos(angle), math.sin(angle)) for angle in angles], 1)
    best = (pairs[:, :, 1] - pairs[:, :, 0]).square().sum(-1).argmax(1)
    return pairs.gather(1, best[:, None, None, None].expand(-1, 1, 2, 2))[:, 0]


def _farthest(points: Tensor, valid: Tensor, cosine: float, sine: float) -> Tensor:
    """The valid points [N, P, 2] that lie first and last along a direction: [N, 2, 2]."""
    along = points[..., 0] * cosine + points[..., 1] * sine
    first = along.masked_fill(~valid, math.inf).argmin(1)
    last = along.masked_fill(~valid, -math.inf).argmax(1)
    return points.gather(1, torch.stack([first, last], 1)[..., None].expand(-1, 2, 2))
