"""The one resampling of a clip from its stored grid to the model's square: the map, and how it is applied.

One map holds for all frames of a clip. Maps go from output to source, both in [-1, 1] over the image (pixel centres at
odd multiples of 1/side). OpenCV applies them on the CPU, torch on the device; both give the same pictures up to
rounding (a test says so). Frames stay uint8, so that the intensities that follow can be a table.
Legend: T frames, C channels, H and W stored pixels, n objects of the clip, S the model's side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medsam2.data.batch import OBJECTS_PER_PLANE, PackedMasks
from medsam2.data.settings import AugmentSettings

PICTURES_TOGETHER = 4
SMALLEST_CROP = 0.15
"""Share of the image's side."""
MAX_SOURCE_PIXELS = 1.5
"""Source pixels per model pixel above which the source is reduced first, against aliasing."""


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


def draw_map(settings: AugmentSettings, numbers: dict[str, float], masks: PackedMasks) -> Map | None:
    """The map of one clip from its uniform numbers in [0, 1); None when nothing was drawn.

    Args:
        masks: of the clip as it is stored, for the crop around an object.
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
    return reduce(lambda inner, step: step.after(inner), steps) if steps else None


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


# How it is applied


def warp(frames: Tensor, masks: PackedMasks, affine: Map, size: int) -> tuple[Tensor, Tensor]:
    """Frames uint8 [T, C, H, W] and masks on [T, H, W] to uint8 [T, C, S, S] and bool [n, T, S, S].

    Frames are bilinear (reduced first where that would alias), masks nearest; outside the image is black. Colour
    frames on the CPU are best stored interleaved (and are given back so): `frames.permute(0, 2, 3, 1)` contiguous.
    """
    sharp = reduced(frames, affine.zoom, size)
    if on_cpu(frames):
        return _warp_opencv(sharp, masks, affine, size)
    return warp_torch(sharp, masks, affine, size)


def plain(frames: Tensor, masks: PackedMasks, size: int) -> tuple[Tensor, Tensor]:
    """The resize without augmentation; shapes as in `warp`. An object that is present in a frame stays so."""
    return resized(frames, size, size), resize_masks(masks.unpack(), size)


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


def reduced(frames: Tensor, zoom: float, size: int) -> Tensor:
    """[T, C, H, W] no larger than the map can show, when it would skip pixels."""
    target = max(1, math.ceil(size / max(zoom, 1e-3)))
    height, width = (min(side, target) if side > MAX_SOURCE_PIXELS * target else side for side in frames.shape[-2:])
    return resized(frames, height, width)


def resized(frames: Tensor, height: int, width: int) -> Tensor:
    """uint8 [T, C, H, W] to the given size, bilinear, without aliasing."""
    if (height, width) == tuple(frames.shape[-2:]):
        return frames
    here = on_cpu(frames)  # elsewhere torch has no antialiasing of uint8
    values = frames if here else frames.to(torch.float32)
    values = F.interpolate(values, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return values if here else values.round_().clamp_(0, 255).to(torch.uint8)


def on_cpu(values: Tensor) -> bool:
    """Whether OpenCV can take it."""
    return values.device.type == "cpu"


# On the device


def warp_torch(frames: Tensor, masks: PackedMasks, affine: Map, size: int) -> tuple[Tensor, Tensor]:
    """`warp` of frames that need no reduction, with `grid_sample`; nothing waits for the device."""
    centres = (torch.arange(size, device=frames.device, dtype=torch.float32) + 0.5) * (2.0 / size) - 1.0
    x, y = centres[None, :], centres[:, None]
    source_x, source_y = affine.xx * x + affine.xy * y + affine.x0, affine.yx * x + affine.yy * y + affine.y0
    inside = (source_x.abs() <= 1) & (source_y.abs() <= 1)
    height, width = masks.bits.shape[-2:]
    columns = ((source_x + 1) * (width / 2)).floor().clamp_(0, width - 1).long()
    rows = ((source_y + 1) * (height / 2)).floor().clamp_(0, height - 1).long()
    moved = PackedMasks(_pick(masks.bits, rows * width + columns) * inside, masks.count).unpack()

    high, wide = frames.shape[-2:]
    # Half a pixel of the border would be mixed with the black outside: clamp what is inside, push away the rest.
    grid = torch.stack(
        [
            source_x.clamp(1.0 / wide - 1, 1 - 1.0 / wide).masked_fill_(~inside, -3.0),
            source_y.clamp(1.0 / high - 1, 1 - 1.0 / high).masked_fill_(~inside, -3.0),
        ],
        dim=-1,
    )
    folded = frames.to(torch.float32).flatten(0, 1)[None]
    sampled = F.grid_sample(folded, grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled.round_().to(torch.uint8).reshape(*frames.shape[:2], size, size), moved


def _pick(masks: Tensor, places: Tensor) -> Tensor:
    """[n, T, H, W] at flat pixel indices [S, S]: [n, T, S, S] (`gather` is ten times as fast as indexing)."""
    index = places.flatten().expand(*masks.shape[:2], -1)
    return masks.flatten(2).gather(2, index).reshape(*masks.shape[:2], *places.shape)


# On the CPU


def _warp_opencv(frames: Tensor, masks: PackedMasks, affine: Map, size: int) -> tuple[Tensor, Tensor]:
    resampler = _Resampler(affine, size)
    pictures = to_pictures(frames)
    warped = [resampler.frame(p) for p in pictures] if pictures.ndim == 4 else _together(pictures, resampler.frame)
    return from_pictures(np.stack(warped)), torch.from_numpy(_warp_masks(masks.bits.numpy(), masks.count, resampler))


def to_pictures(frames: Tensor) -> np.ndarray:
    """uint8 [T, C, H, W] on the CPU as OpenCV takes it: grey [T, H, W], colour [T, H, W, 3]."""
    return np.ascontiguousarray((frames[:, 0] if frames.shape[1] == 1 else frames.permute(0, 2, 3, 1)).numpy())


def from_pictures(pictures: np.ndarray) -> Tensor:
    """The inverse of `to_pictures`."""
    values = torch.from_numpy(pictures)
    return values[:, None] if values.ndim == 3 else values.permute(0, 3, 1, 2)


class _Resampler:
    """One map applied to pictures [H, W] or [H, W, K] of any size."""

    def __init__(self, affine: Map, size: int) -> None:
        self.affine = affine
        self.size = size
        self.inside = self._inside()

    def frame(self, picture: np.ndarray) -> np.ndarray:
        """Bilinear; the border of the image goes on outside, where `inside` then makes it black."""
        warped = self._apply(picture, cv2.INTER_LINEAR, cv2.BORDER_REPLICATE)
        return warped if self.inside is None else cv2.bitwise_and(warped, warped, mask=self.inside)

    def mask(self, picture: np.ndarray) -> np.ndarray:
        """Nearest; 0 outside the image."""
        return self._apply(picture, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT)

    def _apply(self, picture: np.ndarray, interpolation: int, border: int) -> np.ndarray:
        matrix, side = self._matrix(*picture.shape[:2]), (self.size, self.size)
        return cv2.warpAffine(picture, matrix, side, flags=interpolation | cv2.WARP_INVERSE_MAP, borderMode=border)

    def _matrix(self, height: int, width: int) -> np.ndarray:
        """The map from output to source in pixels, 2 x 3."""
        a, size = self.affine, self.size
        first = 1.0 / size - 1.0  # where the centre of the first pixel is
        x0 = (a.xx * first + a.xy * first + a.x0 + 1.0) * width / 2 - 0.5
        y0 = (a.yx * first + a.yy * first + a.y0 + 1.0) * height / 2 - 0.5
        step_x, step_y = width / size, height / size
        return np.array([[a.xx * step_x, a.xy * step_x, x0], [a.yx * step_y, a.yy * step_y, y0]])

    def _inside(self) -> np.ndarray | None:
        """uint8 [S, S], 255 inside the image; None when all is inside."""
        a, edge = self.affine, 1.0 - 1.0 / self.size
        if abs(a.x0) + edge * (abs(a.xx) + abs(a.xy)) <= 1 and abs(a.y0) + edge * (abs(a.yx) + abs(a.yy)) <= 1:
            return None
        centres = ((np.arange(self.size) + 0.5) * (2.0 / self.size) - 1.0).astype(np.float32)
        x = (a.xx * centres + a.x0)[None, :] + (a.xy * centres)[:, None]
        y = (a.yx * centres + a.y0)[None, :] + (a.yy * centres)[:, None]
        inside: np.ndarray = (np.abs(x) <= 1) & (np.abs(y) <= 1)
        return inside.view(np.uint8) * np.uint8(255)


def _together(pictures: np.ndarray, apply: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """Grey pictures [T, H, W], some at a time as the channels of one: three times as fast as one by one."""
    warped: list[np.ndarray] = []
    for first in range(0, len(pictures), PICTURES_TOGETHER):
        warped += cv2.split(apply(cv2.merge(list(pictures[first : first + PICTURES_TOGETHER]))))
    return warped


def _warp_masks(bits: np.ndarray, count: int, resampler: _Resampler) -> np.ndarray:
    """Bits uint8 [G, T, H, W] of `count` objects to bool [count, T, S, S]."""
    masks = np.empty((count, bits.shape[1], resampler.size, resampler.size), bool)
    for group, plane in enumerate(bits):
        objects = range(OBJECTS_PER_PLANE * group, min(OBJECTS_PER_PLANE * (group + 1), count))
        for frame, warped in enumerate(_together(plane, resampler.mask)):
            for index in objects:
                np.not_equal(warped & np.uint8(1 << index % OBJECTS_PER_PLANE), 0, out=masks[index, frame])
    return masks
