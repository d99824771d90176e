"""One click, a box with a click, or several points inside the object and negative ones beside it or on its neighbours.

Of several points each object gets its own number, drawn from the ranges of the settings; the tensors have room for
the largest number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medsam2.prompts.initial import initial_kind
from medsam2.prompts.initial.box import box
from medsam2.prompts.kinds import NEGATIVE, PADDING, POSITIVE, Prompts
from medsam2.prompts.randomness import RandomStream
from medsam2.prompts.regions import click_inside, grow, lookup, points_inside
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import PromptSettings

NEGATIVE_GAP_PIXELS = 2  # between an object and a negative point near it, or the point would be on the border
NEGATIVE_BAND = 0.08  # share of the input's side: how far from the object a negative point near it may lie
NEGATIVES_ON_OTHERS = 0.5  # probability that a negative point lies on another object of the clip, where there is one


@initial_kind
def click(scene: Scene, settings: PromptSettings) -> Prompts:
    """One positive click inside the object; a negative one anywhere where the object is absent."""
    point = click_inside(scene.clickable, scene.uniform(RandomStream.CLICK, settings.click_candidates))
    labels = torch.where(scene.present, POSITIVE, NEGATIVE).to(torch.int32)
    return Prompts(points=point[:, None], labels=labels[:, None])


@initial_kind
def box_click(scene: Scene, settings: PromptSettings) -> Prompts:
    """A box followed by a click inside the object; an absent object gets the negative click alone."""
    clicks = click(scene, settings)
    assert clicks.points is not None and clicks.labels is not None
    return box(scene, settings).with_points(clicks.points, clicks.labels)


@initial_kind
def points(scene: Scene, settings: PromptSettings) -> Prompts:
    """Points [N, most positives + most negatives, 2]; an absent object gets one negative point anywhere."""
    ranges = settings.points
    numbers = scene.uniform(RandomStream.NUMBER_OF_POINTS, 2)
    draws = scene.uniform(RandomStream.POSITIVE_POINTS, ranges.positives[1] * settings.click_candidates)
    inside = points_inside(scene.clickable, draws, settings.click_candidates)
    taken = _taken(numbers[:, 0], ranges.positives)
    first = torch.arange(ranges.positives[1], device=taken.device) == 0
    present = scene.present[:, None]
    labels = torch.where(present & taken, POSITIVE, torch.where(first & ~present, NEGATIVE, PADDING)).to(torch.int32)
    prompts = Prompts(points=inside, labels=labels)
    if ranges.negatives[1] == 0:
        return prompts
    outside, valid = _negatives(scene, ranges.negatives[1])
    valid = valid & present & _taken(numbers[:, 1], ranges.negatives)
    return prompts.with_points(outside, torch.where(valid, NEGATIVE, PADDING).to(torch.int32))


def _taken(numbers: Tensor, count: tuple[int, int]) -> Tensor:
    """bool [N, high]: the first n of each object, n uniform between low and high."""
    low, high = count
    drawn = low + (numbers * (high - low + 1)).long()
    return torch.arange(high, device=numbers.device) < drawn[:, None]


def _negatives(scene: Scene, count: int) -> tuple[Tensor, Tensor]:
    """Points [N, P, 2] off the object, and whether the region that they were drawn from had a pixel at all [N, P]."""
    reach = NEGATIVE_GAP_PIXELS + max(1, round(NEGATIVE_BAND * scene.size))
    band = grow(scene.masks, reach) & ~grow(scene.masks, NEGATIVE_GAP_PIXELS)
    near = points_inside(band, scene.uniform(RandomStream.NEGATIVES_NEARBY, count))
    if scene.others is None:
        return near, lookup(band, near)
    others = scene.others & ~scene.masks
    there = points_inside(others, scene.uniform(RandomStream.NEGATIVES_ON_OTHERS, count))
    on_other = scene.uniform(RandomStream.NEGATIVE_ON_OTHER, count) < NEGATIVES_ON_OTHERS
    on_other = on_other & lookup(others, there)
    return torch.where(on_other[..., None], there, near), on_other | lookup(band, near)
