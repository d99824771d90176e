"""Grey values of one augmented clip, and the normalisation: pictures stay uint8 until one table a frame gives floats.

What looks at one pixel alone (contrast, brightness, gamma, light from frame to frame, ImageNet's normalisation) is
folded into that table; what looks at neighbours (blur, low resolution) or draws for each pixel (noise) comes before.
Legend: T frames, C channels, S the model's side.
"""

from __future__ import annotations

import math
from functools import cache

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtri
from torch import Tensor

from medsam2.data.settings import AugmentSettings, Jitter
from medsam2.data.warp import from_pictures, on_cpu, resized, to_pictures
from medsam2.pixels import standardise


def shade(
    frames: Tensor, settings: AugmentSettings, drawn: dict[str, float], jitter: Tensor, seed: int, out: Tensor
) -> None:
    """uint8 [T, C, S, S] to float [T, 3, S, S], normalised, into `out`.

    Args:
        drawn: numbers in [0, 1) by name. jitter: [2 T] in -1..1, on the frames' device. seed: of the noise.
    """
    if frames.shape[1] == 3:
        frames = mix_channels(frames, settings, drawn)
    if (sigma := strength(settings.blur, drawn, "blur")) is not None:
        frames = blur(frames, sigma)
    if (share := strength(settings.low_resolution, drawn, "low_resolution")) is not None:
        frames = lower_resolution(frames, share)
    if (deviation := strength(settings.noise, drawn, "noise")) is not None:
        frames = add_noise(frames, deviation, seed)
    mean = mean_level(frames) if drawn["contrast"] < settings.contrast.probability else None
    look_up(frames, levels(settings, drawn, jitter, mean), out)


def strength(jitter: Jitter, drawn: dict[str, float], name: str) -> float | None:
    """The strength drawn for `name`, or None when it is not applied to this clip."""
    if drawn[name] >= jitter.probability:
        return None
    low, high = jitter.range
    return low + (high - low) * drawn[f"{name}_value"]


def levels(settings: AugmentSettings, drawn: dict[str, float], jitter: Tensor, mean: Tensor | None) -> Tensor:
    """What becomes of each of the 256 grey values on each frame: [T, 256] in 0..1, on the device of `jitter`.

    Args:
        jitter: [2 T] in -1..1. mean: of the clip, 0..1, where contrast was drawn.
    """
    factors, shifts = jitter.view(2, -1, 1)
    values = torch.arange(256, device=jitter.device, dtype=torch.float32)[None] / 255.0
    if mean is not None and (factor := strength(settings.contrast, drawn, "contrast")) is not None:
        values = (values - mean) * factor + mean
    if (shift := strength(settings.brightness, drawn, "brightness")) is not None:
        values = values + shift
    if (exponent := strength(settings.gamma, drawn, "gamma")) is not None:
        values = values.clamp(0.0, 1.0) ** exponent
    values = values.expand(len(factors), -1)
    if (change := strength(settings.frame, drawn, "frame")) is not None:
        values = values * (1 + change * factors) + 0.5 * change * shifts
    return values.clamp(0.0, 1.0)


def look_up(frames: Tensor, table: Tensor, out: Tensor) -> None:
    """uint8 [T, C, S, S] through the tables [T, 256] of levels 0..1, ImageNet-normalised, into float [T, 3, S, S]."""
    tables = standardise(table[:, None, None, :])[:, :, 0]
    if not on_cpu(frames):
        index = frames.flatten(2).long().expand(-1, 3, -1)
        out.copy_(tables.gather(2, index).view(out.shape))
        return
    places = out.numpy()
    for frame, rows, place in zip(to_pictures(frames), tables.numpy(), places, strict=True):
        channels = [frame] * 3 if frame.ndim == 2 else cv2.split(frame)
        for channel, row, plane in zip(channels, rows, place, strict=True):
            cv2.LUT(channel, row[None], dst=plane)


def mean_level(frames: Tensor) -> Tensor:
    """The mean of uint8 [T, C, S, S] as 0..1, on its device."""
    if not on_cpu(frames):
        return frames.to(torch.float32).mean() / 255.0
    means = [cv2.mean(frame)[: frames.shape[1]] for frame in to_pictures(frames)]
    return torch.tensor(float(np.mean(means)) / 255.0)


def mix_channels(frames: Tensor, settings: AugmentSettings, drawn: dict[str, float]) -> Tensor:
    """uint8 [T, 3, S, S]: all channels their mean ([T, 1, S, S]), or one replaced by the mean of the others."""
    if drawn["greyscale"] < settings.greyscale:
        weights = np.full((1, 3), 1 / 3, np.float32)
    elif drawn["channel_dropout"] < settings.channel_dropout:
        gone = min(int(drawn["channel"] * 3), 2)
        weights = np.eye(3, dtype=np.float32)
        weights[gone] = 0.5
        weights[gone, gone] = 0.0
    else:
        return frames
    if on_cpu(frames):
        return from_pictures(np.stack([cv2.transform(frame, weights) for frame in to_pictures(frames)]))
    mixed = torch.einsum("oc,tchw->tohw", torch.from_numpy(weights).to(frames.device), frames.to(torch.float32))
    return mixed.round_().to(torch.uint8)


def blur(frames: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of uint8 [T, C, S, S] with `sigma` in pixels."""
    if sigma <= 0:
        return frames
    radius = min(max(1, math.ceil(2.5 * sigma)), frames.shape[-1] - 1)
    side = 2 * radius + 1
    if on_cpu(frames):
        return from_pictures(np.stack([cv2.GaussianBlur(frame, (side, side), sigma) for frame in to_pictures(frames)]))
    offsets = torch.arange(-radius, radius + 1, device=frames.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    folded = frames.to(torch.float32).flatten(0, 1)[:, None]
    folded = F.pad(folded, (radius, radius, radius, radius), mode="reflect")
    folded = F.conv2d(F.conv2d(folded, kernel[None, None, None, :]), kernel[None, None, :, None])
    return folded.round_().clamp_(0, 255).to(torch.uint8).reshape(frames.shape)


def lower_resolution(frames: Tensor, share: float) -> Tensor:
    """uint8 [T, C, S, S] reduced to `share` of its side and enlarged again."""
    size = frames.shape[-1]
    small = max(1, round(size * share))
    if small >= size:
        return frames
    return resized(resized(frames, small, small), size, size)


def add_noise(frames: Tensor, deviation: float, seed: int) -> Tensor:
    """uint8 [T, C, S, S] with Gaussian noise of standard deviation `deviation` (0..1)."""
    if not on_cpu(frames):
        generator = torch.Generator(frames.device).manual_seed(seed)
        noise = torch.randn(frames.shape, generator=generator, device=frames.device)
        return (frames + 255.0 * deviation * noise).round_().clamp_(0, 255).to(torch.uint8)
    # A random byte looked up in the quantiles of the normal distribution: a tenth of the time of drawing floats.
    table = np.rint(255.0 * deviation * _quantiles()).astype(np.int16)
    pictures = to_pictures(frames)
    drawn = np.frombuffer(np.random.Generator(np.random.SFC64(seed)).bytes(pictures.size), np.uint8)
    noisy = np.empty_like(pictures)
    for frame, numbers, place in zip(pictures, drawn.reshape(pictures.shape), noisy, strict=True):
        cv2.add(frame, cv2.LUT(numbers, table), dst=place, dtype=cv2.CV_8U)
    return from_pictures(noisy)


@cache
def _quantiles() -> np.ndarray:
    """The normal distribution in 256 equally likely values, of standard deviation 1: float64 [1, 256]."""
    values: np.ndarray = ndtri((np.arange(256) + 0.5) / 256)[None]
    return values / values.std()
