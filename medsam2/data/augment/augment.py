"""Augmentation on the device: from stored clips to the model's input, with one set of parameters per clip.

All random numbers derive from the clip's seed and each clip is computed separately, so that the result does not depend
on the batch or the rank. Frames stay uint8 after resampling (`warp`). Blur, low resolution and noise come first. All
pointwise changes (contrast, brightness, gamma, changes from frame to frame, ImageNet's normalisation) are combined into
one lookup table per frame, which also converts to float.
Legend: B clips, T frames, C channels, N objects of the batch, n objects of a clip, S side of the model's input.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from medsam2.data.augment.warp import draw_map, from_pictures, on_cpu, resize_frames, resize_masks, to_pictures, warp
from medsam2.data.batch import ClipBatch, PackedMasks
from medsam2.data.settings import AugmentSettings, Jitter
from medsam2.pixels import normalise, standardise
from medsam2.prompts.randomness import RandomStream, uniform

NUMBER_NAMES = (
    *("flip_horizontal", "flip_vertical", "affine", "rotation", "shear_x", "shear_y", "scale", "move_x", "move_y"),
    *("unused_1", "unused_2"),  # These replace a removed deformation: removing them would change the numbers below.
    *("crop", "crop_size", "crop_object", "crop_x", "crop_y"),
    *("gamma", "gamma_value", "contrast", "contrast_value", "brightness", "brightness_value"),
    *("noise", "noise_value", "blur", "blur_value", "low_resolution", "low_resolution_value"),
    *("greyscale", "channel_dropout", "channel", "frame", "frame_value"),
)
MIN_REMAINING_PIXELS = 4  # At the model's resolution; an object with fewer pixels counts as moved out of the frame.


@dataclass(frozen=True)
class AugmentedBatch:
    """The input of a training or validation step.

    Attributes:
        frames: float [B, T, 3, S, S], ImageNet-normalised.
        masks: bool [N, T, S, S]; objects that augmentation moved out of the frame are removed.
        object_to_clip: int64 [N], ascending; every clip keeps at least one object.
        object_seeds: int64 [N]. seeds: int64 [B].
        step: the global step of the plan.
        names: structure name of each object (N). keys, datasets, modalities: of each clip (B).
        prompt_frame: the frame that is prompted first; objects that were present on it still are.
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
    """Transforms a `ClipBatch` into an `AugmentedBatch` on the batch's device.

    Args:
        settings: the `augment` group. image_size: S.
    """

    def __init__(self, settings: AugmentSettings, image_size: int) -> None:
        self.settings = settings
        self.image_size = image_size

    def __call__(self, batch: ClipBatch, augment: bool = True) -> AugmentedBatch:
        """Resample and normalise a batch; without `augment`, clips are only resized."""
        clips, length = batch.frames.shape[:2]
        size, prompt_frame = self.image_size, batch.prompt_frame
        device, seeds = batch.frames.device, batch.seeds
        uniforms = uniform(seeds, RandomStream.AUGMENTATION, len(NUMBER_NAMES)).tolist()
        jitter = (uniform(seeds, RandomStream.FRAME_AUGMENTATION, 2 * length) * 2 - 1).to(device, non_blocking=True)
        frames = torch.empty((clips, length, 3, size, size), device=device)
        masks = torch.empty((batch.num_objects, length, size, size), device=device, dtype=torch.bool)
        remaining: list[bool] = []
        for clip, (height, width) in enumerate(batch.sizes.tolist()):
            stored = batch.frames[clip, :, : batch.channels[clip], :height, :width]
            packed = batch.masks_of(clip)
            objects = PackedMasks(packed.bits[..., :height, :width], packed.count)
            if augment:
                numbers = dict(zip(NUMBER_NAMES, uniforms[clip], strict=True))
                values, warped, in_frame = self._resample(stored, objects, numbers, prompt_frame)
                change_intensities(values, self.settings, numbers, jitter[clip], int(seeds[clip]), frames[clip])
            else:
                frames[clip] = normalise(stored, size)
                warped, in_frame = resize_masks(objects.unpack(), size), [True] * objects.count
            masks[len(remaining) : len(remaining) + objects.count] = warped
            remaining += in_frame
        object_to_clip, object_seeds = batch.object_to_clip, batch.object_seeds
        if not all(remaining):
            index = torch.tensor(remaining).nonzero()[:, 0]
            object_to_clip, object_seeds = object_to_clip[index], object_seeds[index]
            masks = masks[index.to(device)]
        return AugmentedBatch(
            frames=frames,
            masks=masks,
            object_to_clip=object_to_clip.to(device, non_blocking=True),
            object_seeds=object_seeds.to(device, non_blocking=True),
            seeds=seeds.to(device, non_blocking=True),
            step=batch.step,
            names=tuple(itertools.compress(batch.names, remaining)),
            keys=batch.keys,
            datasets=batch.datasets,
            modalities=batch.modalities,
            prompt_frame=prompt_frame,
        )

    def _resample(
        self, frames: Tensor, masks: PackedMasks, numbers: dict[str, float], prompt_frame: int
    ) -> tuple[Tensor, Tensor, list[bool]]:
        """Resample one clip: frames uint8 [T, C, S, S], masks bool [n, T, S, S], and which objects are in the frame.

        An object that was present on the prompted frame must still be there; any other object, on some frame. A clip
        that would lose all its objects is resized without augmentation.
        """
        affine = draw_map(self.settings, numbers, masks)
        if affine is not None:
            values, warped = warp(frames, masks, affine, self.image_size)
            counts = warped.flatten(2).sum(-1)
            pixels = torch.where(masks.present(prompt_frame), counts[:, prompt_frame], counts.amax(1))
            in_frame = pixels >= MIN_REMAINING_PIXELS
            if in_frame.any():
                return values, warped, in_frame.tolist()
        frames = resize_frames(frames, self.image_size, self.image_size)
        return frames, resize_masks(masks.unpack(), self.image_size), [True] * masks.count


# Intensities of one clip


def change_intensities(
    frames: Tensor, settings: AugmentSettings, numbers: dict[str, float], jitter: Tensor, seed: int, out: Tensor
) -> None:
    """Augment the intensities of frames uint8 [T, C, S, S] and write them, normalised, to `out` float [T, 3, S, S].

    Args:
        numbers: uniform numbers in [0, 1) by name. jitter: [2 T] in -1..1, on the frames' device. seed: for the noise.
    """
    if frames.shape[1] == 3:
        frames = mix_channels(frames, settings, numbers)
    if (sigma := draw_strength(settings.blur, numbers, "blur")) is not None:
        frames = blur(frames, sigma)
    if (share := draw_strength(settings.low_resolution, numbers, "low_resolution")) is not None:
        frames = lower_resolution(frames, share)
    if (deviation := draw_strength(settings.noise, numbers, "noise")) is not None:
        frames = add_noise(frames, deviation, seed)
    mean = mean_intensity(frames) if numbers["contrast"] < settings.contrast.probability else None
    apply_table(frames, make_table(settings, numbers, jitter, mean), out)


def draw_strength(jitter: Jitter, numbers: dict[str, float], name: str) -> float | None:
    """Return the strength of the change `name`, or None if this clip does not get it."""
    if numbers[name] >= jitter.probability:
        return None
    low, high = jitter.range
    return low + (high - low) * numbers[f"{name}_value"]


def make_table(settings: AugmentSettings, numbers: dict[str, float], jitter: Tensor, mean: Tensor | None) -> Tensor:
    """Return the new value in 0..1 of each of the 256 grey values, on each frame: float [T, 256].

    Args:
        jitter: [2 T] in -1..1. mean: of the clip, in 0..1; None if contrast does not change.
    """
    factors, shifts = jitter.view(2, -1, 1)
    values = torch.arange(256, device=jitter.device, dtype=torch.float32)[None] / 255.0
    if mean is not None and (factor := draw_strength(settings.contrast, numbers, "contrast")) is not None:
        values = (values - mean) * factor + mean
    if (shift := draw_strength(settings.brightness, numbers, "brightness")) is not None:
        values = values + shift
    if (exponent := draw_strength(settings.gamma, numbers, "gamma")) is not None:
        values = values.clamp(0.0, 1.0) ** exponent
    values = values.expand(len(factors), -1)
    if (change := draw_strength(settings.frame, numbers, "frame")) is not None:
        values = values * (1 + change * factors) + 0.5 * change * shifts
    return values.clamp(0.0, 1.0)


def apply_table(frames: Tensor, table: Tensor, out: Tensor) -> None:
    """Apply tables [T, 256] to frames uint8 [T, C, S, S], normalise, and write to `out` float [T, 3, S, S]."""
    tables = standardise(table[:, None, None, :])[:, :, 0]
    if not on_cpu(frames):
        index = frames.flatten(2).long().expand(-1, 3, -1)
        out.copy_(tables.gather(2, index).view(out.shape))
        return
    for frame, frame_tables, target in zip(to_pictures(frames), tables.numpy(), out.numpy(), strict=True):
        channels = [frame] * 3 if frame.ndim == 2 else cv2.split(frame)
        for channel, channel_table, plane in zip(channels, frame_tables, target, strict=True):
            cv2.LUT(channel, channel_table[None], dst=plane)


def mean_intensity(frames: Tensor) -> Tensor:
    """Return the mean of frames uint8 [T, C, S, S], scaled to 0..1, on their device."""
    if not on_cpu(frames):
        return frames.to(torch.float32).mean() / 255.0
    means = [cv2.mean(frame)[: frames.shape[1]] for frame in to_pictures(frames)]
    return torch.tensor(float(np.mean(means)) / 255.0)


def mix_channels(frames: Tensor, settings: AugmentSettings, numbers: dict[str, float]) -> Tensor:
    """Convert frames uint8 [T, 3, S, S] to grey [T, 1, S, S], or replace one channel by the mean of the others."""
    if numbers["greyscale"] < settings.greyscale:
        weights = np.full((1, 3), 1 / 3, np.float32)
    elif numbers["channel_dropout"] < settings.channel_dropout:
        dropped = min(int(numbers["channel"] * 3), 2)
        weights = np.eye(3, dtype=np.float32)
        weights[dropped] = 0.5
        weights[dropped, dropped] = 0.0
    else:
        return frames
    if on_cpu(frames):
        return from_pictures(np.stack([cv2.transform(frame, weights) for frame in to_pictures(frames)]))
    mixed = torch.einsum("oc,tchw->tohw", torch.from_numpy(weights).to(frames.device), frames.to(torch.float32))
    return mixed.round_().to(torch.uint8)


def blur(frames: Tensor, sigma: float) -> Tensor:
    """Blur frames uint8 [T, C, S, S] with a Gaussian of `sigma` pixels."""
    if sigma <= 0:
        return frames
    radius = min(max(1, math.ceil(2.5 * sigma)), frames.shape[-1] - 1)
    side = 2 * radius + 1
    if on_cpu(frames):
        return from_pictures(np.stack([cv2.GaussianBlur(frame, (side, side), sigma) for frame in to_pictures(frames)]))
    return gaussian_blur(frames, [side, side], [sigma, sigma])


def lower_resolution(frames: Tensor, share: float) -> Tensor:
    """Reduce frames uint8 [T, C, S, S] to `share` of their side and enlarge them again."""
    size = frames.shape[-1]
    small = max(1, round(size * share))
    if small >= size:
        return frames
    return resize_frames(resize_frames(frames, small, small), size, size)


def add_noise(frames: Tensor, deviation: float, seed: int) -> Tensor:
    """Add Gaussian noise of standard deviation `deviation` (of 0..1) to frames uint8 [T, C, S, S]."""
    if not on_cpu(frames):
        generator = torch.Generator(frames.device).manual_seed(seed)
        noise = torch.randn(frames.shape, generator=generator, device=frames.device)
        return (frames + 255.0 * deviation * noise).round_().clamp_(0, 255).to(torch.uint8)
    # Random bytes, looked up in the quantiles of the normal distribution, take a tenth of the time of random floats.
    table = np.rint(255.0 * deviation * _quantiles()).astype(np.int16)
    pictures = to_pictures(frames)
    random_bytes = np.frombuffer(np.random.Generator(np.random.SFC64(seed)).bytes(pictures.size), np.uint8)
    noisy = np.empty_like(pictures)
    for frame, indices, target in zip(pictures, random_bytes.reshape(pictures.shape), noisy, strict=True):
        cv2.add(frame, cv2.LUT(indices, table), dst=target, dtype=cv2.CV_8U)
    return from_pictures(noisy)


@cache
def _quantiles() -> np.ndarray:
    """Return 256 equally likely values of the normal distribution, with standard deviation 1: float64 [1, 256]."""
    values: np.ndarray = ndtri((np.arange(256) + 0.5) / 256)[None]
    return values / values.std()
