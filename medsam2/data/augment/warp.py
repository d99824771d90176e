"""Resampling of a clip from its stored grid to the model's input, with one affine map for all frames.

Maps go from output to source coordinates, both in [-1, 1] over the image, as in `torch.nn.functional.affine_grid`
with `align_corners=False`. OpenCV applies them on the CPU and torch on the GPU, with the same result up to rounding.
Frames stay uint8, so that a lookup table can change intensities afterwards.
Legend: T frames, C channels, H and W stored pixels, n objects of the clip, S side of the model's input.
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

FRAMES_PER_CALL = 4
"""Grey frames that OpenCV warps at once, as the channels of one picture."""
MIN_CROP_SHARE = 0.15
"""Smallest side of a crop, as a share of the image's side."""
MAX_DOWNSCALING = 1.5
"""Source pixels per output pixel above which frames are first reduced, to avoid aliasing."""


@dataclass(frozen=True)
class AffineMap:
    """x_source = xx * x + xy * y + x0 and y_source = yx * x + yy * y + y0."""

    xx: float = 1.0
    xy: float = 0.0
    x0: float = 0.0
    yx: float = 0.0
    yy: float = 1.0
    y0: float = 0.0

    def after(self, inner: AffineMap) -> AffineMap:
        """Return the map that applies `inner` first, then this map."""
        return AffineMap(
            self.xx * inner.xx + self.xy * inner.yx,
            self.xx * inner.xy + self.xy * inner.yy,
            self.xx * inner.x0 + self.xy * inner.y0 + self.x0,
            self.yx * inner.xx + self.yy * inner.yx,
            self.yx * inner.xy + self.yy * inner.yy,
            self.yx * inner.x0 + self.yy * inner.y0 + self.y0,
        )

    @property
    def zoom(self) -> float:
        """Side of the visible area, as a share of the image's side."""
        return math.sqrt(abs(self.xx * self.yy - self.xy * self.yx))


def draw_map(settings: AugmentSettings, numbers: dict[str, float], masks: PackedMasks) -> AffineMap | None:
    """Return the map of one clip from its uniform numbers in [0, 1); None for no change.

    Args:
        masks: the clip's stored masks, for the crop around an object.
    """
    height, width = masks.bits.shape[-2:]
    steps = []
    if numbers["flip_horizontal"] < settings.flip_horizontal:
        steps.append(AffineMap(xx=-1.0))
    if numbers["flip_vertical"] < settings.flip_vertical:
        steps.append(AffineMap(yy=-1.0))
    if numbers["affine"] < settings.affine.probability:
        steps.append(_affine(settings, numbers, height, width))
    if numbers["crop"] < settings.crop.probability:
        steps.append(_crop(settings, numbers, masks))
    return reduce(lambda inner, step: step.after(inner), steps) if steps else None


def _affine(settings: AugmentSettings, numbers: dict[str, float], height: int, width: int) -> AffineMap:
    """Return scale, shear, rotation and translation. Angles hold in stored pixels, not in the stretched square."""
    affine = settings.affine
    angle = math.radians(affine.rotation) * (2 * numbers["rotation"] - 1)
    shear_x = math.tan(math.radians(affine.shear) * (2 * numbers["shear_x"] - 1))
    shear_y = math.tan(math.radians(affine.shear) * (2 * numbers["shear_y"] - 1))
    low, high = affine.scale
    shrink = 1.0 / (low * (high / low) ** numbers["scale"])
    aspect = height / width
    cos, sin = math.cos(angle) * shrink, math.sin(angle) * shrink
    turn = AffineMap(xx=cos, xy=-sin * aspect, yx=sin / aspect, yy=cos)
    shear = AffineMap(xy=shear_x * aspect, yx=shear_y / aspect)
    move_x = 2 * affine.translate * (2 * numbers["move_x"] - 1)
    move_y = 2 * affine.translate * (2 * numbers["move_y"] - 1)
    return AffineMap(x0=move_x, y0=move_y).after(turn.after(shear))


def _crop(settings: AugmentSettings, numbers: dict[str, float], masks: PackedMasks) -> AffineMap:
    """Return a zoom on one object: a crop that contains the object's extent over all frames at a random place."""
    height, width = masks.bits.shape[-2:]
    index = min(int(numbers["crop_object"] * masks.count), masks.count - 1)
    extent = masks.object(index).view(torch.uint8).amax(dim=0) > 0  # Six times as fast as `any`.
    rows, columns = extent.any(dim=1).nonzero()[:, 0].tolist(), extent.any(dim=0).nonzero()[:, 0].tolist()
    if not rows:
        return AffineMap()
    left, right = 2 * columns[0] / width - 1, 2 * (columns[-1] + 1) / width - 1
    top, bottom = 2 * rows[0] / height - 1, 2 * (rows[-1] + 1) / height - 1
    low, high = settings.crop.range
    half = max(right - left, bottom - top) / 2 * (low + (high - low) * numbers["crop_size"])
    half = min(1.0, max(MIN_CROP_SHARE, half))
    return AffineMap(
        xx=half,
        x0=_centre(left, right, half, numbers["crop_x"]),
        yy=half,
        y0=_centre(top, bottom, half, numbers["crop_y"]),
    )


def _centre(low: float, high: float, half: float, number: float) -> float:
    """Return the crop's centre on one axis, such that the crop contains the object and lies in the image.

    If both cannot hold, the crop lies in the image.
    """
    slack = max(0.0, half - (high - low) / 2)
    centre = (low + high) / 2 + slack * (2 * number - 1)
    return min(1.0 - half, max(half - 1.0, centre))


# Resampling


def warp(frames: Tensor, masks: PackedMasks, affine: AffineMap, size: int) -> tuple[Tensor, Tensor]:
    """Warp frames uint8 [T, C, H, W] and masks [n, T, H, W] to uint8 [T, C, S, S] and bool [n, T, S, S].

    Frames are interpolated bilinearly, masks by nearest neighbour; pixels outside of the image are 0. Colour frames on
    the CPU should be interleaved in memory (`torch.channels_last`), as are those that are returned.
    """
    frames = reduce_frames(frames, affine.zoom, size)
    if on_cpu(frames):
        return _warp_opencv(frames, masks, affine, size)
    return warp_torch(frames, masks, affine, size)


def resize_masks(masks: Tensor, size: int) -> Tensor:
    """Resize masks bool [n, T, H, W] to [n, T, S, S] by nearest neighbour; by max pooling if an object would vanish."""
    height, width = masks.shape[-2:]
    if (height, width) == (size, size):
        return masks
    centres = 2 * torch.arange(size, device=masks.device) + 1
    rows, columns = centres * height // (2 * size), centres * width // (2 * size)
    resized = _gather_pixels(masks, rows[:, None] * width + columns[None, :])
    if height > size or width > size:
        vanished = masks.flatten(2).any(-1) & ~resized.flatten(2).any(-1)
        if bool(vanished.any()):
            resized[vanished] = F.adaptive_max_pool2d(masks[vanished].to(torch.float32), size) > 0
    return resized


def reduce_frames(frames: Tensor, zoom: float, size: int) -> Tensor:
    """Reduce frames [T, C, H, W] to the resolution of the output, if they exceed it by more than `MAX_DOWNSCALING`."""
    target = max(1, math.ceil(size / max(zoom, 1e-3)))
    height, width = (min(side, target) if side > MAX_DOWNSCALING * target else side for side in frames.shape[-2:])
    return resize_frames(frames, height, width)


def resize_frames(frames: Tensor, height: int, width: int) -> Tensor:
    """Resize frames uint8 [T, C, H, W], bilinear with antialiasing."""
    if (height, width) == tuple(frames.shape[-2:]):
        return frames
    values = frames if on_cpu(frames) else frames.to(torch.float32)  # On GPUs, torch antialiases only floats.
    values = F.interpolate(values, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return values if on_cpu(frames) else values.round_().clamp_(0, 255).to(torch.uint8)


def on_cpu(values: Tensor) -> bool:
    """Return whether OpenCV can process a tensor."""
    return values.device.type == "cpu"


# With torch


def warp_torch(frames: Tensor, masks: PackedMasks, affine: AffineMap, size: int) -> tuple[Tensor, Tensor]:
    """Warp frames that need no reduction with `grid_sample`, as `warp`, without waiting for the device."""
    centres = (torch.arange(size, device=frames.device, dtype=torch.float32) + 0.5) * (2.0 / size) - 1.0
    x, y = centres[None, :], centres[:, None]
    source_x, source_y = affine.xx * x + affine.xy * y + affine.x0, affine.yx * x + affine.yy * y + affine.y0
    inside = (source_x.abs() <= 1) & (source_y.abs() <= 1)
    height, width = masks.bits.shape[-2:]
    columns = ((source_x + 1) * (width / 2)).floor().clamp_(0, width - 1).long()
    rows = ((source_y + 1) * (height / 2)).floor().clamp_(0, height - 1).long()
    bits = _gather_pixels(masks.bits, rows * width + columns) * inside

    # `grid_sample` would blend the outermost half pixel with the black outside: clamp the coordinates inside of the
    # image to pixel centres, and move those outside far away.
    limits = [1 - 1.0 / side for side in (frames.shape[-1], frames.shape[-2])]
    pairs = zip((source_x, source_y), limits, strict=True)
    grid = torch.stack([source.clamp(-limit, limit).masked_fill_(~inside, -3.0) for source, limit in pairs], dim=-1)
    channels = frames.to(torch.float32).flatten(0, 1)[None]
    sampled = F.grid_sample(channels, grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)
    warped = sampled.round_().to(torch.uint8).reshape(*frames.shape[:2], size, size)
    return warped, PackedMasks(bits, masks.count).unpack()


def _gather_pixels(masks: Tensor, pixels: Tensor) -> Tensor:
    """Return masks [n, T, H, W] at flat pixel indices [S, S]: [n, T, S, S]. `gather` is ten times as fast as `[]`."""
    index = pixels.flatten().expand(*masks.shape[:2], -1)
    return masks.flatten(2).gather(2, index).reshape(*masks.shape[:2], *pixels.shape)


# With OpenCV


def _warp_opencv(frames: Tensor, masks: PackedMasks, affine: AffineMap, size: int) -> tuple[Tensor, Tensor]:
    resampler = _Resampler(affine, size)
    pictures = to_pictures(frames)
    warped = (
        [resampler.frame(p) for p in pictures] if pictures.ndim == 4 else _apply_in_groups(pictures, resampler.frame)
    )
    return from_pictures(np.stack(warped)), torch.from_numpy(_warp_masks(masks.bits.numpy(), masks.count, resampler))


def to_pictures(frames: Tensor) -> np.ndarray:
    """Convert frames uint8 [T, C, H, W] on the CPU to OpenCV's layout: grey [T, H, W] or colour [T, H, W, 3]."""
    return np.ascontiguousarray((frames[:, 0] if frames.shape[1] == 1 else frames.permute(0, 2, 3, 1)).numpy())


def from_pictures(pictures: np.ndarray) -> Tensor:
    """Convert pictures in OpenCV's layout back: the inverse of `to_pictures`."""
    values = torch.from_numpy(pictures)
    return values[:, None] if values.ndim == 3 else values.permute(0, 3, 1, 2)


class _Resampler:
    """Applies one map to pictures [H, W] or [H, W, K] of any size."""

    def __init__(self, affine: AffineMap, size: int) -> None:
        self.affine = affine
        self.size = size
        self.inside = self._inside()

    def frame(self, picture: np.ndarray) -> np.ndarray:
        """Warp bilinearly. Outside, the border is replicated and then set to 0, so that it does not fade to black."""
        warped = self._apply(picture, cv2.INTER_LINEAR, cv2.BORDER_REPLICATE)
        return warped if self.inside is None else cv2.bitwise_and(warped, warped, mask=self.inside)

    def mask(self, picture: np.ndarray) -> np.ndarray:
        """Warp by nearest neighbour, with 0 outside of the image."""
        return self._apply(picture, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT)

    def _apply(self, picture: np.ndarray, interpolation: int, border: int) -> np.ndarray:
        matrix, side = self._matrix(*picture.shape[:2]), (self.size, self.size)
        return cv2.warpAffine(picture, matrix, side, flags=interpolation | cv2.WARP_INVERSE_MAP, borderMode=border)

    def _matrix(self, height: int, width: int) -> np.ndarray:
        """Return the map from output to source in pixels: float64 [2, 3]."""
        a, size = self.affine, self.size
        first = 1.0 / size - 1.0  # Coordinate of the centre of the first pixel.
        x0 = (a.xx * first + a.xy * first + a.x0 + 1.0) * width / 2 - 0.5
        y0 = (a.yx * first + a.yy * first + a.y0 + 1.0) * height / 2 - 0.5
        step_x, step_y = width / size, height / size
        return np.array([[a.xx * step_x, a.xy * step_x, x0], [a.yx * step_y, a.yy * step_y, y0]])

    def _inside(self) -> np.ndarray | None:
        """Return a mask uint8 [S, S], 255 inside of the image; None if no pixel is outside."""
        a, edge = self.affine, 1.0 - 1.0 / self.size
        if abs(a.x0) + edge * (abs(a.xx) + abs(a.xy)) <= 1 and abs(a.y0) + edge * (abs(a.yx) + abs(a.yy)) <= 1:
            return None
        centres = ((np.arange(self.size) + 0.5) * (2.0 / self.size) - 1.0).astype(np.float32)
        x = (a.xx * centres + a.x0)[None, :] + (a.xy * centres)[:, None]
        y = (a.yx * centres + a.y0)[None, :] + (a.yy * centres)[:, None]
        inside: np.ndarray = (np.abs(x) <= 1) & (np.abs(y) <= 1)
        return inside.view(np.uint8) * np.uint8(255)


def _apply_in_groups(pictures: np.ndarray, apply: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """Apply a function to grey pictures [T, H, W], `FRAMES_PER_CALL` as channels of one: three times as fast."""
    warped: list[np.ndarray] = []
    for first in range(0, len(pictures), FRAMES_PER_CALL):
        warped += cv2.split(apply(cv2.merge(list(pictures[first : first + FRAMES_PER_CALL]))))
    return warped


def _warp_masks(bits: np.ndarray, count: int, resampler: _Resampler) -> np.ndarray:
    """Warp the bits uint8 [G, T, H, W] of `count` objects and unpack them to bool [count, T, S, S]."""
    masks = np.empty((count, bits.shape[1], resampler.size, resampler.size), bool)
    for group, plane in enumerate(bits):
        objects = range(OBJECTS_PER_PLANE * group, min(OBJECTS_PER_PLANE * (group + 1), count))
        for frame, warped in enumerate(_apply_in_groups(plane, resampler.mask)):
            for index in objects:
                np.not_equal(warped & np.uint8(1 << index % OBJECTS_PER_PLANE), 0, out=masks[index, frame])
    return masks
