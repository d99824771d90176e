"""Augmentation on the device: stored clips to the model's square, one set of parameters a clip.

Every number comes from the clip's own seed, and every clip is computed alone, so that the result does not depend on
which batch or rank a clip is in. Legend: B clips, T frames, C channels, N objects, n of one clip, S the model's side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from medsam2.data.augment_settings import AugmentSettings, Jitter
from medsam2.data.batch import ClipBatch
from medsam2.data.geometry import draw_map, plain, sample
from medsam2.pixels import standardise
from medsam2.prompts.randomness import uniform

NUMBERS = (
    *("flip_horizontal", "flip_vertical", "affine", "rotation", "shear_x", "shear_y", "scale", "move_x", "move_y"),
    *("crop", "crop_size", "crop_object", "crop_x", "crop_y"),
    *("gamma", "gamma_value", "contrast", "contrast_value", "brightness", "brightness_value"),
    *("noise", "noise_value", "blur", "blur_value", "low_resolution", "low_resolution_value"),
    *("greyscale", "channel_dropout", "channel", "frame", "frame_value"),
)
_TAG, _FRAME_TAG = 101, 102  # streams of the counter-based numbers


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
        numbers = uniform(batch.seeds.cpu(), _TAG, len(NUMBERS)).tolist()
        jitter = uniform(batch.seeds, _FRAME_TAG, 2 * batch.frames.shape[1]) * 2 - 1
        owners = batch.object_to_clip.tolist()
        sizes, seeds = batch.sizes.tolist(), batch.seeds.tolist()
        channels = batch.channels or (batch.frames.shape[2],) * len(sizes)
        frames, masks, keep = [], [], []
        for clip, (height, width) in enumerate(sizes):
            first = owners.index(clip)
            last = first + owners.count(clip)
            stored = batch.frames[clip, :, : channels[clip], :height, :width]
            objects = batch.masks[first:last, :, :height, :width]
            drawn = dict(zip(NUMBERS, numbers[clip], strict=True))
            values, moved, kept = self._resample(stored, objects, drawn if augment else None)
            if augment:
                values = self._intensity(values, drawn, jitter[clip], seeds[clip])
            frames.append(standardise(values))
            masks.append(moved)
            keep += kept
        kept_index = torch.tensor([i for i, kept in enumerate(keep) if kept], device=batch.masks.device)
        return AugmentedBatch(
            frames=torch.stack(frames),
            masks=torch.cat(masks)[kept_index],
            object_to_clip=batch.object_to_clip[kept_index],
            object_seeds=batch.object_seeds[kept_index],
            seeds=batch.seeds,
            step=batch.step,
            names=tuple(name for name, kept in zip(batch.names, keep, strict=True) if kept),
            keys=batch.keys,
            datasets=batch.datasets,
            modalities=batch.modalities,
        )

    def _resample(
        self, frames: Tensor, masks: Tensor, drawn: dict[str, float] | None
    ) -> tuple[Tensor, Tensor, list[bool]]:
        """One clip's frames 0..1, its masks, and which objects are still where they were.

        An object that was present on the first frame must remain there, another one somewhere. A clip that would
        lose all its objects is resized without augmentation instead.
        """
        chosen = draw_map(self.settings, drawn, masks) if drawn is not None else None
        if chosen is not None:
            values, moved = sample(frames, masks, chosen, self.image_size)
            counts = moved.flatten(2).sum(-1)
            prompted = masks[:, 0].flatten(1).any(-1)
            kept = torch.where(prompted, counts[:, 0], counts.amax(1)) >= self.settings.min_pixels
            flags = [bool(flag) for flag in kept.tolist()]
            if any(flags):
                return values, moved, flags
        values, moved = plain(frames, masks, self.image_size)
        return values, moved, [True] * len(masks)

    def _intensity(self, values: Tensor, drawn: dict[str, float], jitter: Tensor, seed: int) -> Tensor:
        """Grey values of one clip [T, C, S, S] in 0..1; `jitter` [2 T] in -1..1."""
        settings = self.settings
        if (sigma := _strength(settings.blur, drawn, "blur")) is not None:
            values = blur(values, sigma)
        if (share := _strength(settings.low_resolution, drawn, "low_resolution")) is not None:
            values = lower_resolution(values, share)
        if (deviation := _strength(settings.noise, drawn, "noise")) is not None:
            generator = torch.Generator(values.device).manual_seed(seed)
            values = values + deviation * torch.randn(values.shape, generator=generator, device=values.device)
        if (factor := _strength(settings.contrast, drawn, "contrast")) is not None:
            mean = values.mean()
            values = (values - mean) * factor + mean
        if (shift := _strength(settings.brightness, drawn, "brightness")) is not None:
            values = values + shift
        if (exponent := _strength(settings.gamma, drawn, "gamma")) is not None:
            values = values.clamp(0.0, 1.0) ** exponent
        if (strength := _strength(settings.frame, drawn, "frame")) is not None:
            factors, shifts = jitter.view(2, -1, 1, 1, 1)
            values = values * (1 + strength * factors) + 0.5 * strength * shifts
        if values.shape[1] == 3:
            values = self._colour(values, drawn)
        return values.clamp(0.0, 1.0)

    def _colour(self, values: Tensor, drawn: dict[str, float]) -> Tensor:
        """[T, 3, S, S]: all channels their mean, or one channel replaced by the mean of the others."""
        if drawn["greyscale"] < self.settings.greyscale:
            return values.mean(dim=1, keepdim=True).expand_as(values)
        if drawn["channel_dropout"] < self.settings.channel_dropout:
            gone = min(int(drawn["channel"] * 3), 2)
            others = [channel for channel in range(3) if channel != gone]
            values = values.clone()
            values[:, gone] = values[:, others].mean(dim=1)
        return values


def _strength(jitter: Jitter, drawn: dict[str, float], name: str) -> float | None:
    """The strength drawn for `name`, or None when it is not applied to this clip."""
    if drawn[name] >= jitter.probability:
        return None
    low, high = jitter.range
    return low + (high - low) * drawn[f"{name}_value"]


def blur(values: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [T, C, S, S] with `sigma` in pixels."""
    if sigma <= 0:
        return values
    radius = min(max(1, math.ceil(2.5 * sigma)), values.shape[-1] - 1)
    offsets = torch.arange(-radius, radius + 1, device=values.device, dtype=values.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    folded = F.pad(values.flatten(0, 1)[:, None], (radius, radius, radius, radius), mode="reflect")
    folded = F.conv2d(F.conv2d(folded, kernel[None, None, None, :]), kernel[None, None, :, None])
    return folded.reshape(values.shape)


def lower_resolution(values: Tensor, share: float) -> Tensor:
    """[T, C, S, S] reduced to `share` of its side and enlarged again."""
    size = values.shape[-1]
    small = max(1, round(size * share))
    if small >= size:
        return values
    reduced = F.interpolate(values, (small, small), mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(reduced, (size, size), mode="bilinear", align_corners=False)
