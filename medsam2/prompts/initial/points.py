"""Several positive points inside the object and negative ones beside it or on the clip's other objects.

Each object gets its own number of each, drawn from the ranges of the settings; the tensors have room for the most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medsam2.prompts.kinds import NEGATIVE, PADDING, POSITIVE, Prompts
from medsam2.prompts.randomness import uniform
from medsam2.prompts.regions import grow, lookup, points_inside
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import PromptSettings

NAME = "points"
TAG_POSITIVE, TAG_NEAR, TAG_OTHER, TAG_NUMBER, TAG_WHERE = 613, 614, 615, 616, 618
GAP = 2  # pixels between an object and a negative point near it, or the point would be on the border


def simulate(scene: Scene, settings: PromptSettings) -> Prompts:
    """Points [N, most positives + most negatives, 2]; an absent object gets one negative point anywhere."""
    numbers = uniform(scene.seeds, scene.tag(TAG_NUMBER), 2)
    most = settings.positives[1]
    inside = points_inside(scene.clickable, scene.seeds, scene.tag(TAG_POSITIVE), most, settings.click_candidates)
    kept = _kept(numbers[:, 0], settings.positives)
    first = torch.arange(most, device=kept.device) == 0
    present = scene.present[:, None]
    labels = torch.where(present & kept, POSITIVE, torch.where(first & ~present, NEGATIVE, PADDING)).to(torch.int32)
    prompts = Prompts(points=inside, labels=labels)
    if settings.negatives[1] == 0:
        return prompts
    outside, found = _negatives(scene, settings)
    found = found & present & _kept(numbers[:, 1], settings.negatives)
    return prompts.with_points(outside, torch.where(found, NEGATIVE, PADDING).to(torch.int32))


def _kept(numbers: Tensor, count: tuple[int, int]) -> Tensor:
    """bool [N, high]: the first n of each object, n uniform between low and high."""
    low, high = count
    drawn = low + (numbers * (high - low + 1)).long()
    return torch.arange(high, device=numbers.device) < drawn[:, None]


def _negatives(scene: Scene, settings: PromptSettings) -> tuple[Tensor, Tensor]:
    """Points [N, P, 2] off the object, and whether the region that they were drawn from had a pixel at all [N, P]."""
    count, masks = settings.negatives[1], scene.masks
    band = grow(masks, GAP + max(1, round(settings.negative_band * scene.size))) & ~grow(masks, GAP)
    near = points_inside(band, scene.seeds, scene.tag(TAG_NEAR), count)
    if scene.others is None:
        return near, lookup(band, near)
    others = scene.others & ~masks
    there = points_inside(others, scene.seeds, scene.tag(TAG_OTHER), count)
    on_other = uniform(scene.seeds, scene.tag(TAG_WHERE), count) < settings.negatives_on_others
    on_other = on_other & lookup(others, there)
    points = torch.where(on_other[..., None], there, near)
    return points, on_other | lookup(band, near)
