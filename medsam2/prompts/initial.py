"""The kinds of initial prompts that training simulates, each a function with `@initial_kind`.

Such a function converts a `Scene` to `Prompts`. It processes all objects at once and never copies a value from the
device to the host. It draws random numbers by `scene.uniform` and `scene.normal` from its own `RandomStream`, and
returns the same number of points for each object; missing ones are labelled as padding. A recipe chooses kinds by name:
`kinds: {NAME: WEIGHT}` in configs/prompts/.

Legend: N objects, S side of the model's input, P points.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medsam2.plugins import register
from medsam2.prompts.kinds import INITIAL_KINDS, NEGATIVE, PADDING, POSITIVE, Prompts, Simulate
from medsam2.prompts.randomness import RandomStream
from medsam2.prompts.regions import click_inside, grow, lookup, points_inside, row_ends, tight_boxes
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import BoxSettings, PromptSettings, ScribbleSettings

GROWTH_GRID_PIXELS = 256.0  # `box.grow` is in pixels of an input of this side.
MAX_JITTER_PIXELS = 20.0  # As in Meta's training code.
NEGATIVE_GAP_PIXELS = 2  # Negative points near an object are at least this far away, since borders are ambiguous.
NEGATIVE_BAND_SHARE = 0.08  # Width of the band for negative points near an object, as a share of the input's side.
NEGATIVE_ON_OTHER_PROBABILITY = 0.5  # That a negative point lies on another object of the clip, if there is one.
DIAMETER_DIRECTIONS = 64  # The longest diameter is underestimated by at most 1 - cos(pi / 128), 0.03 %.
SCRIBBLE_POINTS = 6
SCRIBBLE_CURVES = 8  # Candidates, of which the longest is taken.
CURVE_STEPS = 48  # Steps of a curve in each of both directions.
HEADING_WAVES = 3  # Waves that a curve's heading is the sum of.
START_CANDIDATES = 4


def initial_kind(function: Simulate) -> Simulate:
    """Register a kind of initial prompt under the function's name (a decorator).

    Raises:
        RuntimeError: the name is taken.
    """
    return register(INITIAL_KINDS, function.__name__, function, "kinds of prompt")


# ------------------------------------------------------------------------------------------------------ masks and boxes


@initial_kind
def mask(scene: Scene, settings: PromptSettings) -> Prompts:
    """The ground-truth mask, which becomes the frame's output (SAM 2's semi-supervised video task)."""
    return Prompts(masks=scene.masks[:, None])


@initial_kind
def box(scene: Scene, settings: PromptSettings) -> Prompts:
    """A noisy box; padding if the object is absent."""
    return Prompts.from_boxes(jittered_boxes(scene, settings.box)).hide_absent(scene.masks)


def jittered_boxes(scene: Scene, settings: BoxSettings, limit: float = MAX_JITTER_PIXELS) -> Tensor:
    """Return boxes [N, 4] (x0, y0, x1, y1): scaled, grown, jittered, then clipped to the image.

    Args:
        limit: largest jitter of a side, in pixels.
    """
    tight = tight_boxes(scene.masks)
    sides = tight[:, 2:] - tight[:, :2]
    reach = 0.5 * settings.scale * scene.normal(RandomStream.BOX_SCALE, 2) * sides
    growth = scene.uniform(RandomStream.BOX_GROWTH, 4) * (settings.grow * scene.size / GROWTH_GRID_PIXELS)
    boxes = tight + torch.cat([-reach, reach], 1)
    boxes = boxes + torch.cat([-growth[:, :2], growth[:, 2:]], 1)
    return (boxes + _jitter(scene, (sides * settings.jitter).repeat(1, 2), settings, limit)).clamp(0, scene.size - 1)


def _jitter(scene: Scene, scale: Tensor, settings: BoxSettings, limit: float) -> Tensor:
    """Return noise [N, 4] of a scale [N, 4], at most `limit` pixels.

    The scale of uniform noise is limited, rather than its values, as in Meta's training code.
    """
    if settings.jitter_law == "normal":
        return (scene.normal(RandomStream.BOX_JITTER, 4) * scale).clamp(-limit, limit)
    return ((scene.uniform(RandomStream.BOX_JITTER, 4) * 2 - 1) * scale.clamp(max=limit)).clamp(-limit, limit)


# --------------------------------------------------------------------------------------------------------------- points


@initial_kind
def click(scene: Scene, settings: PromptSettings) -> Prompts:
    """One positive click inside the object; a negative click anywhere if the object is absent."""
    point = click_inside(scene.clickable, scene.uniform(RandomStream.CLICK, settings.click_candidates))
    labels = torch.where(scene.present, POSITIVE, NEGATIVE).to(torch.int32)
    return Prompts(points=point[:, None], labels=labels[:, None])


@initial_kind
def box_click(scene: Scene, settings: PromptSettings) -> Prompts:
    """A box followed by a click inside the object; only a negative click if the object is absent."""
    clicks = click(scene, settings)
    assert clicks.points is not None and clicks.labels is not None
    return box(scene, settings).with_points(clicks.points, clicks.labels)


@initial_kind
def points(scene: Scene, settings: PromptSettings) -> Prompts:
    """Positive and negative points [N, P, 2]; one negative point anywhere if the object is absent.

    P is the sum of the largest numbers of positive and of negative points.
    """
    ranges = settings.points
    numbers = scene.uniform(RandomStream.NUMBER_OF_POINTS, 2)
    draws = scene.uniform(RandomStream.POSITIVE_POINTS, ranges.positives[1] * settings.click_candidates)
    inside = points_inside(scene.clickable, draws, settings.click_candidates)
    used = _used_points(numbers[:, 0], ranges.positives)
    first = torch.arange(ranges.positives[1], device=used.device) == 0
    present = scene.present[:, None]
    labels = torch.where(present & used, POSITIVE, torch.where(first & ~present, NEGATIVE, PADDING)).to(torch.int32)
    prompts = Prompts(points=inside, labels=labels)
    if ranges.negatives[1] == 0:
        return prompts
    outside, valid = _negative_points(scene, ranges.negatives[1])
    valid = valid & present & _used_points(numbers[:, 1], ranges.negatives)
    return prompts.with_points(outside, torch.where(valid, NEGATIVE, PADDING).to(torch.int32))


def _used_points(numbers: Tensor, limits: tuple[int, int]) -> Tensor:
    """Return which of `high` points each object uses: the first n, n uniform in `limits`; bool [N, high]."""
    low, high = limits
    counts = low + (numbers * (high - low + 1)).long()
    return torch.arange(high, device=numbers.device) < counts[:, None]


def _negative_points(scene: Scene, count: int) -> tuple[Tensor, Tensor]:
    """Return points [N, P, 2] outside of the object, and whether each is valid [N, P].

    A point is invalid if the region from which it was drawn is empty.
    """
    reach = NEGATIVE_GAP_PIXELS + max(1, round(NEGATIVE_BAND_SHARE * scene.size))
    band = grow(scene.masks, reach) & ~grow(scene.masks, NEGATIVE_GAP_PIXELS)
    near = points_inside(band, scene.uniform(RandomStream.NEGATIVES_NEARBY, count))
    if scene.others is None:
        return near, lookup(band, near)
    others = scene.others & ~scene.masks
    far = points_inside(others, scene.uniform(RandomStream.NEGATIVES_ON_OTHERS, count))
    on_other = scene.uniform(RandomStream.NEGATIVE_ON_OTHER, count) < NEGATIVE_ON_OTHER_PROBABILITY
    on_other = on_other & lookup(others, far)
    return torch.where(on_other[..., None], far, near), on_other | lookup(band, near)


# --------------------------------------------------------------------------------------------------------- RECIST lines
# RECIST 1.1 (Eisenhauer et al. 2009, Eur J Cancer 45:228-247) measures a lesion by its longest diameter on one slice.
# Public lesion datasets contain this line and no mask.


@initial_kind
def recist(scene: Scene, settings: PromptSettings) -> Prompts:
    """Points [N, 3, 2]: both ends of the line, then its middle.

    Jitter never moves an end off the object. The middle is padding if it lies off the object, which may be bent.
    """
    ends = drawn_line(scene, settings.recist.jitter)
    points = torch.cat([ends, torch.lerp(ends[:, 0], ends[:, 1], 0.5)[:, None]], 1)
    labels = torch.where(lookup(scene.masks, points), POSITIVE, PADDING).to(torch.int32)
    return Prompts(points=points, labels=labels)


@initial_kind
def recist_box(scene: Scene, settings: PromptSettings) -> Prompts:
    """The square box centred on the line, with the line's length as side (for lesions without a mask)."""
    ends = drawn_line(scene, settings.recist.jitter)
    centre = ends.mean(1)
    reach = 0.5 * (ends[:, 1] - ends[:, 0]).norm(dim=1, keepdim=True)
    boxes = torch.cat([centre - reach, centre + reach], 1).clamp(0, scene.size - 1)
    return Prompts.from_boxes(boxes).hide_absent(scene.masks)


def drawn_line(scene: Scene, jitter: float) -> Tensor:
    """Return the longest diameter with jittered ends, as a radiologist draws it: float [N, 2, 2].

    `jitter` is the standard deviation of the noise, as a share of the diameter.
    """
    ends = longest_diameter(scene.masks)
    length = (ends[:, 1] - ends[:, 0]).norm(dim=1)[:, None, None]
    noise = scene.normal(RandomStream.RECIST_ENDS, 4).reshape(-1, 2, 2)
    moved = ends + noise * length * jitter
    return torch.where(lookup(scene.masks, moved)[..., None], moved, ends)


def longest_diameter(masks: Tensor) -> Tensor:
    """Return both ends (x, y) of the longest line between two pixels of each mask bool [N, S, S]: float [N, 2, 2].

    The farthest pixels along each of 64 directions are compared. The line of an empty mask is arbitrary, but finite.
    """
    points, valid = row_ends(masks)
    angles = [math.pi * k / DIAMETER_DIRECTIONS for k in range(DIAMETER_DIRECTIONS)]
    pairs = torch.stack([_farthest(points, valid, math.cos(angle), math.sin(angle)) for angle in angles], 1)
    best = (pairs[:, :, 1] - pairs[:, :, 0]).square().sum(-1).argmax(1)
    return pairs.gather(1, best[:, None, None, None].expand(-1, 1, 2, 2))[:, 0]


def _farthest(points: Tensor, valid: Tensor, cosine: float, sine: float) -> Tensor:
    """Return the first and the last valid point of points [N, P, 2] along a direction: [N, 2, 2]."""
    along = points[..., 0] * cosine + points[..., 1] * sine
    first = along.masked_fill(~valid, math.inf).argmin(1)
    last = along.masked_fill(~valid, -math.inf).argmax(1)
    return points.gather(1, torch.stack([first, last], 1)[..., None].expand(-1, 2, 2))


# ------------------------------------------------------------------------------------------------------------ scribbles
# Several curves start at a point well inside the object and are followed in both directions until they leave it. The
# longest one is taken, since people draw along an elongated structure, not across it.


@initial_kind
def scribble(scene: Scene, settings: PromptSettings) -> Prompts:
    """Points [N, 6, 2], evenly spaced along the curve; padding if the object is absent."""
    start = click_inside(scene.clickable, scene.uniform(RandomStream.SCRIBBLE_START, START_CANDIDATES))
    curves = start[:, None, None] + random_curves(scene, settings.scribble)
    inside = lookup(scene.masks, curves)
    # The middle of a curve is its starting point. Count the steps until each half leaves the object.
    back = inside[..., :CURVE_STEPS].flip(-1).long().cumprod(-1).sum(-1)
    forth = inside[..., CURVE_STEPS + 1 :].long().cumprod(-1).sum(-1)
    best = (back + forth).argmax(1, keepdim=True)
    back, forth = back.gather(1, best), forth.gather(1, best)
    shares = torch.linspace(0, 1, SCRIBBLE_POINTS, device=start.device)
    steps = (CURVE_STEPS - back + (shares * (back + forth)).round().long())[..., None].expand(-1, -1, 2)
    longest = curves.gather(1, best[..., None, None].expand(-1, 1, *curves.shape[2:]))[:, 0]
    points = longest.gather(1, steps).round()
    labels = torch.where(scene.present, POSITIVE, PADDING).to(torch.int32)
    return Prompts(points=points, labels=labels[:, None].expand(-1, SCRIBBLE_POINTS))


def random_curves(scene: Scene, settings: ScribbleSettings) -> Tensor:
    """Return smooth random curves through the origin, float [N, SCRIBBLE_CURVES, 2 * CURVE_STEPS + 1, 2] in pixels.

    The heading is a random direction plus slow waves. The length of each half is `settings.length` times the diagonal
    of the object's box.
    """
    boxes = tight_boxes(scene.masks)
    diagonal = (boxes[:, 2:] - boxes[:, :2]).norm(dim=1)
    position = torch.arange(-CURVE_STEPS, CURVE_STEPS + 1, device=diagonal.device) / CURVE_STEPS
    heading = scene.uniform(RandomStream.SCRIBBLE_HEADING, SCRIBBLE_CURVES) * 2 * math.pi
    bends = scene.normal(RandomStream.SCRIBBLE_BENDS, SCRIBBLE_CURVES * HEADING_WAVES)
    bends = bends.reshape(-1, SCRIBBLE_CURVES, HEADING_WAVES, 1)
    waves = torch.stack([torch.sin(position * math.pi * (k + 1) / 2) / (k + 1) for k in range(HEADING_WAVES)])
    angle = heading[..., None] + settings.bend * (bends * waves).sum(2)
    steps = torch.stack([angle.cos(), angle.sin()], -1)
    curves = steps.cumsum(2)
    curves = curves - curves[:, :, CURVE_STEPS : CURVE_STEPS + 1]
    return curves * (diagonal * settings.length / CURVE_STEPS)[:, None, None, None]
