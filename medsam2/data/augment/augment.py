"""Augmentation on the device: stored clips to the model's square, one set of parameters a clip.

Every number comes from the clip's own seed, and every clip is computed alone, so that the result does not depend on
which batch or rank a clip is in. After the resampling (`warp`) pictures stay uint8 until one table a frame gives
floats: what looks at one pixel alone (contrast, brightness, gamma, light from frame to frame, ImageNet's normalisation)
is folded into that table; what looks at neighbours (blur, low resolution) or draws for each pixel (noise) comes before.
Legend: B clips, T frames, C channels, N objects, n of one clip, S the model's side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from medsam2.data.augment.warp import draw_map, from_pictures, on_cpu, plain, resize_masks, resized, to_pictures, warp
from medsam2.data.batch import ClipBatch, PackedMasks
from medsam2.data.settings import AugmentSettings, Jitter
from medsam2.pixels import normalise, standardise
from medsam2.prompts.randomness import RandomStream, uniform

NUMBERS = (
    *("flip_horizontal", "flip_vertical", "affine", "rotation", "shear_x", "shear_y", "scale", "move_x", "move_y"),
    *("unused_1", "unused_2"),  # they keep the place of a deformation that was removed: a number depends on its place
    *("crop", "crop_size", "crop_object", "crop_x", "crop_y"),
    *("gamma", "gamma_value", "contrast", "contrast_value", "brightness", "brightness_value"),
    *("noise", "noise_value", "blur", "blur_value", "low_resolution", "low_resolution_value"),
    *("greyscale", "channel_dropout", "channel", "frame", "frame_value"),
)
MIN_PIXELS_LEFT = 4  # model pixels; an object with fewer counts as pushed out of its frame


@dataclass(frozen=True)
class AugmentedBatch:
    """What a training or validation step takes.

    Attributes:
        frames: float [B, T, 3, S, S], ImageNet-normalised.
        masks: bool [N, T, S, S]; objects that augmentation pushed out of their frames are left out.
        object_to_clip: int64 [N], ascending; every clip keeps at least one object.
        object_seeds: int64 [N]. seeds: int64 [B].
        step: the global step of the plan.
        names: the structure of each object (N). keys, datasets, modalities: one a clip (B).
        prompt_frame: the frame that is prompted first; objects that were on it as stored are still there.
    """

    frames: Tensor
    masks: Tensor
    object_to_clip: Tensor
    object_seeds: Tensor
    seeds: Tensor
    step: int
    names: tuple[str, ...]
    keys: tuple[str, ...]
    datasets: tuple[str, ...]
    modalities: tuple[str, ...]
    prompt_frame: int = 0

    @property
    def num_objects(self) -> int:
        return int(self.masks.shape[0])


class Augment:
    """Callable: `ClipBatch` -> `AugmentedBatch`, on the batch's device.

    Args:
        settings: the `augment` group. image_size: S.
    """

    def __init__(self, settings: AugmentSettings, image_size: int) -> None:
        self.settings = settings
        self.image_size = image_size

    def __call__(self, batch: ClipBatch, augment: bool = True) -> AugmentedBatch:
        """Resample, change intensities (only with `augment`), normalise."""
        clips, length = batch.frames.shape[:2]
        size, prompt_frame = self.image_size, batch.prompt_frame
        device, seeds = batch.frames.device, batch.seeds
        numbers = uniform(seeds, RandomStream.AUGMENTATION, len(NUMBERS)).tolist()
        jitter = (uniform(seeds, RandomStream.FRAME_AUGMENTATION, 2 * length) * 2 - 1).to(device, non_blocking=True)
        frames = torch.empty((clips, length, 3, size, size), device=device)
        masks = torch.empty((batch.num_objects, length, size, size), device=device, dtype=torch.bool)
        keep: list[bool] = []
        for clip, (height, width) in enumerate(batch.sizes.tolist()):
            stored = batch.frames[clip, :, : batch.channels[clip], :height, :width]
            packed = batch.masks_of(clip)
            objects = PackedMasks(packed.bits[..., :height, :width], packed.count)
            if augment:
                drawn = dict(zip(NUMBERS, numbers[clip], strict=True))
                values, moved, kept = self._resample(stored, objects, drawn, prompt_frame)
                shade(values, self.settings, drawn, jitter[clip], int(seeds[clip]), frames[clip])
            else:
                frames[clip] = normalise(stored, size)
                moved, kept = resize_masks(objects.unpack(), size), [True] * objects.count
            masks[len(keep) : len(keep) + objects.count] = moved
            keep += kept
        object_to_clip, object_seeds = batch.object_to_clip, batch.object_seeds
        if not all(keep):
            index = torch.tensor([i for i, kept in enumerate(keep) if kept])
            object_to_clip, object_seeds = object_to_clip[index], object_seeds[index]
            masks = masks[index.to(device)]
        return AugmentedBatch(
            frames=frames,
            masks=masks,
            object_to_clip=object_to_clip.to(device, non_blocking=True),
            object_seeds=object_seeds.to(device, non_blocking=True),
            seeds=seeds.to(device, non_blocking=True),
            step=batch.step,
            names=tuple(name for name, kept in zip(batch.names, keep, strict=True) if kept),
            keys=batch.keys,
            datasets=batch.datasets,
            modalities=batch.modalities,
            prompt_frame=prompt_frame,
        )

    def _resample(
        self, frames: Tensor, masks: PackedMasks, drawn: dict[str, float], prompt_frame: int
    ) -> tuple[Tensor, Tensor, list[bool]]:
        """One clip's frames uint8 [T, C, S, S], its masks, and which objects are still where they were.

        An object that was present on the prompted frame must remain there, another one somewhere. A clip that would
        lose all its objects is resized without augmentation instead.
        """
        affine = draw_map(self.settings, drawn, masks)
        if affine is not None:
            values, moved = warp(frames, masks, affine, self.image_size)
            kept = self._kept(masks.present(prompt_frame), moved, prompt_frame)
            if any(kept):
                return values, moved, kept
        values, moved = plain(frames, masks, self.image_size)
        return values, moved, [True] * masks.count

    def _kept(self, prompted: Tensor, moved: Tensor, prompt_frame: int) -> list[bool]:
        """For each object: whether enough pixels are left. prompted: bool [n], stored on the prompted frame."""
        counts = moved.flatten(2).sum(-1)
        left = torch.where(prompted, counts[:, prompt_frame], counts.amax(1))
        return [bool(flag) for flag in (left >= MIN_PIXELS_LEFT).tolist()]


# Grey values of one augmented clip


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
    return gaussian_blur(frames, [side, side], [sigma, sigma])


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
