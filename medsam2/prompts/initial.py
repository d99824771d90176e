"""The kinds of initial prompts that training simulates, each a function of its name with `@initial_kind` above it.

Such a function takes a `Scene` to `Prompts`. It is tensor code over all objects at once: it never reads a value back to
the host, draws its numbers by `scene.uniform` and `scene.normal` from streams of its own, and returns as many points
for each object as for any other (those that an object lacks are labelled as padding). A recipe names its kinds:
`kinds: {NAME: WEIGHT}` in configs/prompts/.

Legend: N objects, S side of the model's input, P points.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from medsam2.plugins import register
from medsam2.prompts.kinds import NEGATIVE, PADDING, POSITIVE, Prompts
from medsam2.prompts.randomness import RandomStream
from medsam2.prompts.regions import click_inside, grow, lookup, points_inside, row_ends, tight_boxes
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import BoxSettings, PromptSettings, ScribbleSettings

GROWTH_GRID_PIXELS = 256.0  # side of the input in whose pixels `box.grow` is given
MAX_JITTER_PIXELS = 20.0  # as in Meta's training code
NEGATIVE_GAP_PIXELS = 2  # between an object and a negative point near it, or the point would be on the border
NEGATIVE_BAND = 0.08  # share of the input's side: how far from the object a negative point near it may lie
NEGATIVES_ON_OTHERS = 0.5  # probability that a negative point lies on another object of the clip, where there is one
DIRECTIONS = 64  # the longest diameter is missed by at most 1 - cos(pi / 128), 0.03 %
SCRIBBLE_POINTS = 6
SCRIBBLE_CURVES = 8  # the longest of them is taken
STEPS = 48  # of a curve, each way
BENDS = 3  # waves of a curve's heading, each with its own strength
START_CANDIDATES = 4

Simulate = Callable[[Scene, PromptSettings], Prompts]
INITIAL_KINDS: dict[str, Simulate] = {}


def initial_kind(function: Simulate) -> Simulate:
    """Make a function known as the kind of its own name.

    Raises:
        RuntimeError: the name is taken.
    """
    return register(INITIAL_KINDS, function.__name__, function, "kinds of prompt")


# ------------------------------------------------------------------------------------------------------ masks and boxes


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


# --------------------------------------------------------------------------------------------------------------- points


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


# --------------------------------------------------------------------------------------------------------- RECIST lines
# RECIST 1.1 (Eisenhauer et al. 2009, Eur J Cancer 45:228-247) measures a lesion by its longest diameter on one slice;
# public lesion sets carry that line and nothing else.


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


# ------------------------------------------------------------------------------------------------------------ scribbles
# Several curves are drawn through one point well inside, each followed both ways until it leaves the object; the one
# that got farthest is kept, as a hand follows an elongated structure rather than crossing it.


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
    shares = torch.linspace(0, 1, SCRIBBLE_POINTS, device=start.device)
    steps = (STEPS - back + (shares * (back + forth)).round().long())[..., None].expand(-1, -1, 2)
    longest = curves.gather(1, best[..., None, None].expand(-1, 1, *curves.shape[2:]))[:, 0]
    points = longest.gather(1, steps).round()
    labels = torch.where(scene.present, POSITIVE, PADDING).to(torch.int32)
    return Prompts(points=points, labels=labels[:, None].expand(-1, SCRIBBLE_POINTS))


def random_curves(scene: Scene, settings: ScribbleSettings) -> Tensor:
    """Smooth curves through the origin, float [N, SCRIBBLE_CURVES, 2 * STEPS + 1, 2] in pixels.

    Their heading is a random one plus slow waves; their length each way is `settings.length` of the object's diagonal.
    """
    number = len(scene.masks)
    boxes = tight_boxes(scene.masks)
    diagonal = (boxes[:, 2:] - boxes[:, :2]).norm(dim=1)
    place = torch.arange(-STEPS, STEPS + 1, device=diagonal.device) / STEPS
    heading = scene.uniform(RandomStream.SCRIBBLE_HEADING, SCRIBBLE_CURVES) * 2 * math.pi
    bends = scene.normal(RandomStream.SCRIBBLE_BENDS, SCRIBBLE_CURVES * BENDS).reshape(
        number, SCRIBBLE_CURVES, BENDS, 1
    )
    waves = torch.stack([torch.sin(place * math.pi * (k + 1) / 2) / (k + 1) for k in range(BENDS)])
    angle = heading[..., None] + settings.bend * (bends * waves).sum(2)
    steps = torch.stack([angle.cos(), angle.sin()], -1)
    path = steps.cumsum(2)
    path = path - path[:, :, STEPS : STEPS + 1]
    return path * (diagonal * settings.length / STEPS)[:, None, None, None]
