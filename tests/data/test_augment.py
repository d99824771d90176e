from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from medsam2.data.augment import Augment, AugmentedBatch, blur, lower_resolution
from medsam2.data.augment_settings import AugmentSettings
from medsam2.data.batch import ClipBatch
from medsam2.data.geometry import Map, resize_masks, sample
from medsam2.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise

STRONG = Path(__file__).parents[2] / "configs" / "augment" / "strong.yaml"


def strong(**changes: Any) -> AugmentSettings:
    return AugmentSettings.model_validate({**yaml.safe_load(STRONG.read_text()), **changes})


def disk(height: int, width: int, y: float, x: float, radius: float) -> Tensor:
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None, :]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def make_batch(clips: int = 4, frames: int = 3, first_seed: int = 0, channels: int = 1) -> ClipBatch:
    """Clips of different sizes with a large disk (drawn white in the image) and a smaller one."""
    height, width = 96, 110
    image = torch.zeros((clips, frames, channels, height, width), dtype=torch.uint8)
    masks = torch.zeros((2 * clips, frames, height, width), dtype=torch.bool)
    sizes = [(96 - 8 * (i % 3), 110 - 10 * (i % 2)) for i in range(clips)]
    for i, (h, w) in enumerate(sizes):
        for t in range(frames):
            masks[2 * i, t, :h, :w] = disk(h, w, h / 2 + 3 * t, w / 2, 22)
            masks[2 * i + 1, t, :h, :w] = disk(h, w, h / 5, w / 5, 8)
        image[i] = masks[2 * i, :, None] * 255
    return ClipBatch(
        frames=image,
        masks=masks,
        sizes=torch.tensor(sizes),
        object_to_clip=torch.arange(clips).repeat_interleave(2),
        seeds=torch.arange(first_seed, first_seed + clips) * 977,
        step=3,
        names=("large", "small") * clips,
        keys=tuple(f"k{i}" for i in range(clips)),
        datasets=("d",) * clips,
        modalities=("CT",) * clips,
        channels=(channels,) * clips,
    )


def grey(batch: AugmentedBatch) -> Tensor:
    """The first channel in 0..1, [B, T, S, S]."""
    return batch.frames[:, :, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]


def part(batch: ClipBatch, first: int, last: int) -> ClipBatch:
    objects = slice(2 * first, 2 * last)
    return replace(
        batch,
        frames=batch.frames[first:last],
        masks=batch.masks[objects],
        sizes=batch.sizes[first:last],
        object_to_clip=batch.object_to_clip[objects] - first,
        seeds=batch.seeds[first:last],
        names=batch.names[objects],
        keys=batch.keys[first:last],
        datasets=batch.datasets[first:last],
        modalities=batch.modalities[first:last],
        channels=batch.channels[first:last],
    )


@pytest.mark.parametrize("size", [64, 128])
def test_masks_and_frames_stay_aligned(size: int) -> None:
    """The white disk of the image, cut at half its brightness, is the mask of the first object."""
    quiet = {name: {"probability": 0.0} for name in ("gamma", "contrast", "brightness", "noise", "frame")}
    batch = make_batch(16)
    result = Augment(strong(**quiet, blur={"probability": 0.0}, low_resolution={"probability": 0.0}), size)(batch)
    image = grey(result) > 0.5
    for index, (clip, name) in enumerate(zip(result.object_to_clip.tolist(), result.names, strict=True)):
        if name == "large":
            seen, mask = image[clip], result.masks[index]
            overlap = (seen & mask).sum() / (seen | mask).sum()
            assert overlap > 0.9


def test_the_same_seeds_give_the_same_batch_and_others_do_not() -> None:
    augment = Augment(strong(), 64)
    first, again, other = augment(make_batch()), augment(make_batch()), augment(make_batch(first_seed=50))
    assert torch.equal(first.frames, again.frames) and torch.equal(first.masks, again.masks)
    assert not torch.equal(first.frames, other.frames)


@pytest.mark.parametrize("channels", [1, 3])
def test_two_halves_equal_the_whole(channels: int) -> None:
    """So 2 ranks of b clips see what 1 rank of 2 b clips sees, bit for bit."""
    augment, batch = Augment(strong(), 64), make_batch(6, channels=channels)
    whole = augment(batch)
    halves = [augment(part(batch, 0, 3)), augment(part(batch, 3, 6))]
    assert torch.equal(whole.frames, torch.cat([half.frames for half in halves]))
    assert torch.equal(whole.masks, torch.cat([half.masks for half in halves]))
    assert torch.equal(whole.object_seeds, torch.cat([half.object_seeds for half in halves]))


def test_a_grey_clip_does_not_care_whether_a_colour_clip_is_beside_it() -> None:
    augment, batch = Augment(strong(), 64), make_batch(2)
    beside = replace(batch, frames=batch.frames.expand(-1, -1, 3, -1, -1))
    assert torch.equal(augment(batch).frames, augment(beside).frames)


def test_without_augmentation_it_is_the_plain_resize() -> None:
    batch = make_batch(2)
    for result in (Augment(AugmentSettings(), 64)(batch), Augment(strong(), 64)(batch, augment=False)):
        height, width = batch.sizes[1].tolist()
        assert torch.equal(result.frames[1], normalise(batch.frames[1, :, :, :height, :width], 64))
        assert result.num_objects == 4 and result.step == 3


def test_the_identity_map_is_the_plain_resize_up_to_interpolation() -> None:
    batch = make_batch(1)
    frames, masks = sample(batch.frames[0, :, :, :96, :110], batch.masks[:2, :, :96, :110], Map(), 96)
    assert torch.equal(masks, resize_masks(batch.masks[:2, :, :96, :110], 96))
    expected = torch.nn.functional.interpolate(batch.frames[0] / 255.0, (96, 96), mode="bilinear")
    assert torch.allclose(frames, expected, atol=1e-4)


def test_flips_are_exact() -> None:
    batch = make_batch(1)
    plain = Augment(AugmentSettings(), 96)(batch)
    for changes, axis in (({"flip_horizontal": 1.0}, -1), ({"flip_vertical": 1.0}, -2)):
        flipped = Augment(AugmentSettings.model_validate(changes), 96)(batch)
        assert torch.equal(flipped.masks.flip(axis), plain.masks)


def test_a_rotation_keeps_the_shape_of_stored_pixels() -> None:
    """A disk of an oblong image, turned, covers the same share of the square."""
    settings = AugmentSettings.model_validate({"affine": {"probability": 1.0, "rotation": 60.0}})
    batch = make_batch(8)
    turned, plain = Augment(settings, 128)(batch), Augment(AugmentSettings(), 128)(batch)
    assert turned.masks[::2].sum() / plain.masks[::2].sum() == pytest.approx(1.0, abs=0.02)
    assert not torch.equal(turned.masks, plain.masks)


def test_a_crop_holds_the_object_and_enlarges_it() -> None:
    settings = AugmentSettings.model_validate({"crop": {"probability": 1.0, "range": [1.2, 2.0]}})
    batch = make_batch(8)
    cropped, plain = Augment(settings, 96)(batch), Augment(AugmentSettings(), 96)(batch)
    for clip in range(8):
        before = plain.masks[plain.object_to_clip == clip].flatten(2).sum(-1)[:, 0]
        after = cropped.masks[cropped.object_to_clip == clip].flatten(2).sum(-1)[:, 0]
        assert after.max() > 1.5 * before.min()


def test_objects_pushed_out_are_dropped_and_a_clip_never_loses_all() -> None:
    """Translated by up to a whole image, many objects leave; what stays is on its first frame."""
    settings = AugmentSettings.model_validate({"affine": {"probability": 1.0, "translate": 1.0}})
    batch = make_batch(24)
    result = Augment(settings, 64)(batch)
    assert 24 <= result.num_objects < 48
    assert set(result.object_to_clip.tolist()) == set(range(24))
    assert result.object_to_clip.tolist() == sorted(result.object_to_clip.tolist())
    assert len(result.names) == len(result.object_seeds) == result.num_objects
    assert result.masks[:, 0].flatten(1).any(1).all()
    places = {"large": 0, "small": 1}
    for clip, name, seed in zip(
        result.object_to_clip.tolist(), result.names, result.object_seeds.tolist(), strict=True
    ):
        assert seed == batch.object_seeds[2 * clip + places[name]], "seeds stay with their objects"


def test_a_tiny_structure_survives_a_large_reduction() -> None:
    masks = torch.zeros(1, 2, 512, 512, dtype=torch.bool)
    masks[0, 0, 101:103, 203:205] = True
    resized = resize_masks(masks, 32)
    assert resized[0, 0].any() and not resized[0, 1].any()


def test_a_large_reduction_under_rotation_does_not_alias() -> None:
    stripes = (torch.arange(512) % 2 * 255).to(torch.uint8).expand(1, 1, 512, 512)
    turned = Map(xx=0.9, xy=-0.1, yx=0.1, yy=0.9)
    values, _ = sample(stripes, torch.zeros(1, 1, 512, 512, dtype=torch.bool), turned, 64)
    assert float(values.std()) < 0.1


def test_intensities_stay_in_range_and_nothing_moves() -> None:
    settings = strong(flip_horizontal=0, flip_vertical=0, affine={}, crop={})
    batch = make_batch(12, channels=3)
    result = Augment(settings, 64)(batch)
    assert float(grey(result).min()) >= -1e-5 and float(grey(result).max()) <= 1 + 1e-5
    assert torch.equal(result.masks, Augment(AugmentSettings(), 64)(batch).masks)
    assert result.frames.isfinite().all()


def test_blur_and_lower_resolution_keep_the_mean_and_lose_detail() -> None:
    values = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    for result in (blur(values, 1.5), lower_resolution(values, 0.3)):
        assert result.shape == values.shape
        assert float(result.mean()) == pytest.approx(float(values.mean()), abs=0.01)
        assert float(result.std()) < 0.5 * float(values.std())
    assert torch.equal(blur(values, 0.0), values) and torch.equal(lower_resolution(values, 1.0), values)
