"""The one resampling of a clip: from its stored grid to the model's square, with one affine map for all frames.

Maps go from output to source, both in [-1, 1] over the image (pixel centres at odd multiples of 1/side).
Legend: T frames, C channels, H and W stored pixels, n objects of the clip, S the model's side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medsam2.data.augment_settings import AugmentSettings
from medsam2.pixels import resize

SHARPEST = 1.5  # source pixels per model pixel above which the source is reduced first, against aliasing
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


def draw_map(settings: AugmentSettings, numbers: dict[str, float], masks: Tensor) -> Map | None:
    """The map of one clip from its uniform numbers in [0, 1); None when nothing was drawn.

    Args:
        masks: bool [n, T, H, W], for the crop around an object.
    """
    height, width = masks.shape[-2:]
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


def _crop(settings: AugmentSettings, numbers: dict[str, float], masks: Tensor) -> Map:
    """A zoom on one object, taken over all frames, which lies somewhere inside the crop."""
    height, width = masks.shape[-2:]
    which = min(int(numbers["crop_object"] * len(masks)), len(masks) - 1)
    seen = masks[which].any(dim=0)
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


def sample(frames: Tensor, masks: Tensor, chosen: Map, size: int) -> tuple[Tensor, Tensor]:
    """Frames uint8 [T, C, H, W] and masks bool [n, T, H, W] through a map: float 0..1 [T, C, S, S], bool [n, T, S, S].

    Frames are bilinear (reduced first where that would alias), masks nearest; outside the image is black.
    """
    height, width = frames.shape[-2:]
    centres = (torch.arange(size, device=frames.device, dtype=torch.float32) + 0.5) * (2.0 / size) - 1.0
    x, y = centres[None, :], centres[:, None]
    source_x = chosen.xx * x + chosen.xy * y + chosen.x0
    source_y = chosen.yx * x + chosen.yy * y + chosen.y0
    inside = (source_x.abs() <= 1) & (source_y.abs() <= 1)

    columns = ((source_x + 1) * (width / 2)).floor().clamp_(0, width - 1).long()
    rows = ((source_y + 1) * (height / 2)).floor().clamp_(0, height - 1).long()
    moved = _pick(masks, rows * width + columns) & inside

    values = frames.to(torch.float32) / 255.0
    values = _reduced(values, chosen.zoom, size)
    high, wide = values.shape[-2:]
    # Half a pixel of the border would be mixed with the black outside: clamp what is inside, push away the rest.
    grid = torch.stack(
        [
            source_x.clamp(1.0 / wide - 1, 1 - 1.0 / wide).masked_fill_(~inside, -3.0),
            source_y.clamp(1.0 / high - 1, 1 - 1.0 / high).masked_fill_(~inside, -3.0),
        ],
        dim=-1,
    )
    folded = values.flatten(0, 1)[None]
    sampled = F.grid_sample(folded, grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.reshape(*frames.shape[:2], size, size), moved


def _pick(masks: Tensor, places: Tensor) -> Tensor:
    """bool [n, T, H, W] at flat pixel indices [S, S]: [n, T, S, S] (`gather` is ten times as fast as indexing)."""
    index = places.flatten().expand(*masks.shape[:2], -1)
    return masks.flatten(2).gather(2, index).reshape(*masks.shape[:2], *places.shape)


def _reduced(values: Tensor, zoom: float, size: int) -> Tensor:
    """[T, C, H, W] no larger than the map can show, when it would skip pixels."""
    target = max(1, math.ceil(size / max(zoom, 1e-3)))
    height, width = (min(side, target) if side > SHARPEST * target else side for side in values.shape[-2:])
    if (height, width) == tuple(values.shape[-2:]):
        return values
    return F.interpolate(values, (height, width), mode="bilinear", antialias=True, align_corners=False)


def plain(frames: Tensor, masks: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The resize without augmentation; shapes as in `sample`. An object that is present in a frame stays so."""
    return resize(frames, size), resize_masks(masks, size)


def resize_masks(masks: Tensor, size: int) -> Tensor:
    """bool [n, T, H, W] to [n, T, S, S], nearest; a structure that falls between the samples keeps its pixels."""
    height, width = masks.shape[-2:]
    if (height, width) == (size, size):
        return masks
    places = torch.arange(size, device=masks.device)
    rows, columns = (2 * places + 1) * height // (2 * size), (2 * places + 1) * width // (2 * size)
    resized = _pick(masks, rows[:, None] * width + columns[None, :])
    if height > size or width > size:
        vanished = masks.flatten(2).any(-1) & ~resized.flatten(2).any(-1)
        if bool(vanished.any()):
            resized[vanished] = F.adaptive_max_pool2d(masks[vanished].to(torch.float32), size) > 0
    return resized
