"""Augmentation on the device: stored clips to the model's square, one set of parameters a clip.

Every number comes from the clip's own seed, and every clip is computed alone, so that the result does not depend on
which batch or rank a clip is in. Legend: B clips, T frames, C channels, N objects, n of one clip, S the model's side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medsam2.data.batch import ClipBatch, PackedMasks
from medsam2.data.intensity import shade
from medsam2.data.settings import AugmentSettings
from medsam2.data.warp import draw_map, plain, resize_masks, warp
from medsam2.pixels import normalise
from medsam2.prompts.randomness import RandomStream, uniform

NUMBERS = (
    *("flip_horizontal", "flip_vertical", "affine", "rotation", "shear_x", "shear_y", "scale", "move_x", "move_y"),
    *("unused_1", "unused_2"),  # they keep the place of a deformation that was removed: a number depends on its place
    *("crop", "crop_size", "crop_object", "crop_x", "crop_y"),
    *("gamma", "gamma_value", "contrast", "contrast_value", "brightness", "brightness_value"),
    *("noise", "noise_value", "blur", "blur_value", "low_resolution", "low_resolution_value"),
    *("greyscale", "channel_dropout", "channel", "frame", "frame_value"),
)


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
        channels = batch.channels or (batch.frames.shape[2],) * clips
        frames = torch.empty((clips, length, 3, size, size), device=device)
        masks = torch.empty((batch.num_objects, length, size, size), device=device, dtype=torch.bool)
        keep: list[bool] = []
        for clip, (height, width) in enumerate(batch.sizes.tolist()):
            stored = batch.frames[clip, :, : channels[clip], :height, :width]
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
        return [bool(flag) for flag in (left >= self.settings.min_pixels).tolist()]
