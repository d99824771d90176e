"""Where the pixels of the model's square come from: one map for all frames of a clip, drawn from its numbers.

Maps go from output to source, both in [-1, 1] over the image (pixel centres at odd multiples of 1/side).
Legend: T frames, H and W stored pixels, n objects of the clip, S the model's side, P control points a side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medsam2.data.augment_settings import AugmentSettings, Elastic
from medsam2.data.masks import PackedMasks
from medsam2.prompts.randomness import RandomStream, uniform

SMALLEST_CROP = 0.15  # share of the image's side


@dataclass(frozen=True)
class Map:
    """x_source = xx * x + xy * y + x0 and y_source = yx * x + yy * y + y0."""

    xx: float = 1.0
    xy: float = 0.0
    x0: float = 0.0
    yx: float = 0.0
    yy: float = 1.0
    y0: float = 0.0

    def after(self, inner: Map) -> Map:
        """This map applied to the result of `inner`."""
        return Map(
            self.xx * inner.xx + self.xy * inner.yx,
            self.xx * inner.xy + self.xy * inner.yy,
            self.xx * inner.x0 + self.xy * inner.y0 + self.x0,
            self.yx * inner.xx + self.yy * inner.yx,
            self.yx * inner.xy + self.yy * inner.yy,
            self.yx * inner.x0 + self.yy * inner.y0 + self.y0,
        )

    @property
    def zoom(self) -> float:
        """Side of what is seen over the side of the image."""
        return math.sqrt(abs(self.xx * self.yy - self.xy * self.yx))


@dataclass(frozen=True)
class Placement:
    """An affine map, and an elastic field [2, P, P] that is added to the output's coordinates before it."""

    affine: Map = Map()
    field: Tensor | None = None


def draw_placement(
    settings: AugmentSettings, numbers: dict[str, float], seed: Tensor, masks: PackedMasks
) -> Placement | None:
    """Affine map and elastic field of one clip; None when neither was drawn.

    Args:
        seed: int64 [1], on the host. masks: of the clip as it is stored.
    """
    affine, field = draw_map(settings, numbers, masks), draw_field(settings.elastic, numbers, seed)
    if affine is None and field is None:
        return None
    return Placement(affine or Map(), field)


def draw_map(settings: AugmentSettings, numbers: dict[str, float], masks: PackedMasks) -> Map | None:
    """The map of one clip from its uniform numbers in [0, 1); None when nothing was drawn.

    Args:
        masks: for the crop around an object.
    """
    height, width = masks.bits.shape[-2:]
    steps = []
    if numbers["flip_horizontal"] < settings.flip_horizontal:
        steps.append(Map(xx=-1.0))
    if numbers["flip_vertical"] < settings.flip_vertical:
        steps.append(Map(yy=-1.0))
    if numbers["affine"] < settings.affine.probability:
        steps.append(_affine(settings, numbers, height, width))
    if numbers["crop"] < settings.crop.probability:
        steps.append(_crop(settings, numbers, masks))
    if not steps:
        return None
    result = steps[0]
    for step in steps[1:]:
        result = step.after(result)
    return result


def _affine(settings: AugmentSettings, numbers: dict[str, float], height: int, width: int) -> Map:
    """Rotation and shear keep angles of stored pixels although the square stretches them."""
    affine = settings.affine
    angle = math.radians(affine.rotation) * (2 * numbers["rotation"] - 1)
    shear_x = math.tan(math.radians(affine.shear) * (2 * numbers["shear_x"] - 1))
    shear_y = math.tan(math.radians(affine.shear) * (2 * numbers["shear_y"] - 1))
    low, high = affine.scale
    shrink = 1.0 / (low * (high / low) ** numbers["scale"])
    aspect = height / width
    cos, sin = math.cos(angle) * shrink, math.sin(angle) * shrink
    turn = Map(xx=cos, xy=-sin * aspect, yx=sin / aspect, yy=cos)
    shear = Map(xy=shear_x * aspect, yx=shear_y / aspect)
    move_x = 2 * affine.translate * (2 * numbers["move_x"] - 1)
    move_y = 2 * affine.translate * (2 * numbers["move_y"] - 1)
    return Map(x0=move_x, y0=move_y).after(turn.after(shear))


def _crop(settings: AugmentSettings, numbers: dict[str, float], masks: PackedMasks) -> Map:
    """A zoom on one object, taken over all frames, which lies somewhere inside the crop."""
    height, width = masks.bits.shape[-2:]
    which = min(int(numbers["crop_object"] * masks.count), masks.count - 1)
    seen = masks.object(which).view(torch.uint8).amax(dim=0) > 0  # six times as fast as `any`
    rows, columns = seen.any(dim=1).nonzero()[:, 0].tolist(), seen.any(dim=0).nonzero()[:, 0].tolist()
    if not rows:
        return Map()
    left, right = 2 * columns[0] / width - 1, 2 * (columns[-1] + 1) / width - 1
    top, bottom = 2 * rows[0] / height - 1, 2 * (rows[-1] + 1) / height - 1
    low, high = settings.crop.range
    half = max(right - left, bottom - top) / 2 * (low + (high - low) * numbers["crop_size"])
    half = min(1.0, max(SMALLEST_CROP, half))
    return Map(
        xx=half,
        x0=_centre(left, right, half, numbers["crop_x"]),
        yy=half,
        y0=_centre(top, bottom, half, numbers["crop_y"]),
    )


def _centre(low: float, high: float, half: float, number: float) -> float:
    """The crop's centre on one axis: anywhere that keeps the object inside, and the crop in the image."""
    slack = max(0.0, half - (high - low) / 2)
    centre = (low + high) / 2 + slack * (2 * number - 1)
    return min(1.0 - half, max(half - 1.0, centre))


def draw_field(elastic: Elastic, numbers: dict[str, float], seed: Tensor) -> Tensor | None:
    """The elastic displacements of one clip from its seed (int64 [1], on the host); None when not drawn.

    float32 [2, P, P]: x and y at the control points, in the units of maps, before the affine map.
    """
    if numbers["elastic"] >= elastic.probability:
        return None
    low, high = elastic.range
    side = low + (high - low) * numbers["elastic_value"]
    drawn = uniform(seed, RandomStream.ELASTIC_FIELD, 2 * elastic.points**2).view(2, elastic.points, elastic.points)
    return 2.0 * side * (2.0 * drawn - 1.0)


def source_points(placed: Placement, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each model pixel comes from: x and y in [-1, 1] over the image, float32 [S, S] each."""
    centres = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (2.0 / size) - 1.0
    x, y = centres[None, :], centres[:, None]
    if placed.field is not None:
        controls = placed.field.to(device, non_blocking=True)[None]
        moved = F.interpolate(controls, (size, size), mode="bicubic", align_corners=True)[0]
        x, y = x + moved[0], y + moved[1]
    chosen = placed.affine
    return chosen.xx * x + chosen.xy * y + chosen.x0, chosen.yx * x + chosen.yy * y + chosen.y0
