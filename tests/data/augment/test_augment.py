from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packed import pack
from torch import Tensor

from medsam2.data.augment import augment as augment_module
from medsam2.data.augment import warp
from medsam2.data.augment.augment import Augment, AugmentedBatch
from medsam2.data.augment.warp import resize_masks
from medsam2.data.batch import ClipBatch
from medsam2.data.settings import AugmentSettings
from medsam2.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise

STRONG = Path(__file__).parents[3] / "configs" / "augment" / "strong.yaml"


def strong(**changes: Any) -> AugmentSettings:
    return AugmentSettings.model_validate({**yaml.safe_load(STRONG.read_text()), **changes})


def disk(height: int, width: int, y: float, x: float, radius: float) -> Tensor:
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None, :]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def packed(masks: Tensor) -> Tensor:
    """Bits of clips with two objects each."""
    return torch.cat([pack(pair) for pair in masks.split(2)])


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
        bits=packed(masks),
        objects=(2,) * clips,
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
        bits=batch.bits[first:last],
        objects=batch.objects[first:last],
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
            disk_in_image, mask = image[clip], result.masks[index]
            overlap = (disk_in_image & mask).sum() / (disk_in_image | mask).sum()
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
    """To the bit where augmentation is off (as evaluation sees it), to a grey level where nothing was drawn."""
    batch = make_batch(2)
    height, width = batch.sizes[1].tolist()
    expected = normalise(batch.frames[1, :, :, :height, :width], 64)
    off, nothing = Augment(strong(), 64)(batch, augment=False), Augment(AugmentSettings(), 64)(batch)
    assert torch.equal(off.frames[1], expected)
    assert float((nothing.frames[1] - expected).abs().max()) < 1 / 255 / min(IMAGENET_STD)
    for result in (off, nothing):
        assert result.num_objects == 4 and result.step == 3


def test_stored_at_the_models_size_nothing_is_lost_on_the_way() -> None:
    batch = part(make_batch(3), 2, 3)
    batch = replace(batch, frames=batch.frames[..., :80, :80], bits=batch.bits[..., :80, :80])
    batch = replace(batch, sizes=torch.tensor([[80, 80]]))
    assert torch.equal(Augment(AugmentSettings(), 80)(batch).frames[0], normalise(batch.frames[0], 80))


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


def test_an_object_must_stay_on_the_prompted_frame_whichever_that_is() -> None:
    """An object that sinks out of the picture with time, moved down: what stays depends on the prompted frame."""
    settings = AugmentSettings.model_validate({"affine": {"probability": 1.0, "translate": 0.35}})
    batch = make_batch(24, frames=4)
    masks = torch.zeros_like(batch.masks)
    for i, (height, width) in enumerate(batch.sizes.tolist()):
        for t in range(4):
            masks[2 * i, t, :height, :width] = disk(height, width, height / 2, width / 2, 20)
            masks[2 * i + 1, t, :height, :width] = disk(height, width, height * (0.3 + 0.2 * t), width / 2, 6)
    batch = replace(batch, bits=packed(masks))
    first, last = Augment(settings, 64)(batch), Augment(settings, 64)(replace(batch, prompt_frame=3))
    assert last.prompt_frame == 3 and first.prompt_frame == 0
    assert last.masks[:, 3].flatten(1).any(1).all() and first.masks[:, 0].flatten(1).any(1).all()
    assert not first.masks[:, 3].flatten(1).any(1).all(), "some objects leave the last frame, and stay in the clip"
    assert last.num_objects < 48 and last.object_to_clip.tolist() != first.object_to_clip.tolist()


def test_every_kind_of_augmentation_changes_the_picture_when_it_is_drawn() -> None:
    """Each entry of the group alone, at its strong range: a name that nothing reads would change nothing."""
    strong_settings = yaml.safe_load(STRONG.read_text())
    batch = make_batch(2, channels=3)
    noisy = torch.randint(0, 255, batch.frames.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = replace(batch, frames=noisy)
    nothing = Augment(AugmentSettings(), 64)(batch).frames
    assert set(AugmentSettings.model_fields) == set(strong_settings)
    for name, entry in strong_settings.items():
        always = {**entry, "probability": 1.0} if isinstance(entry, dict) else 1.0
        changed = Augment(AugmentSettings.model_validate({name: always}), 64)(batch).frames
        assert not torch.equal(changed, nothing), name


@pytest.mark.parametrize("channels", [1, 3])
def test_the_device_path_gives_the_same_batch_as_opencv(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch path, run on CPU tensors that say they are elsewhere; noise alone has another generator."""
    augment = Augment(strong(noise={}), 96)
    batch = make_batch(12, channels=channels)
    here = augment(batch)
    for module in (augment_module, warp):
        monkeypatch.setattr(module, "on_cpu", lambda values: False)
    there = augment(batch)
    assert here.names == there.names and torch.equal(here.object_to_clip, there.object_to_clip)
    assert float((here.masks == there.masks).float().mean()) > 0.998
    assert float((grey(here) - grey(there)).abs().mean()) < 0.5 / 255
    assert float(((grey(here) - grey(there)).abs() > 6 / 255).float().mean()) < 0.004, "apart from the image's edge"


def test_a_tiny_structure_survives_a_large_reduction() -> None:
    masks = torch.zeros(1, 2, 512, 512, dtype=torch.bool)
    masks[0, 0, 101:103, 203:205] = True
    resized = resize_masks(masks, 32)
    assert resized[0, 0].any() and not resized[0, 1].any()


def test_intensities_stay_in_range_and_nothing_moves() -> None:
    settings = strong(flip_horizontal=0, flip_vertical=0, affine={}, crop={})
    batch = make_batch(12, channels=3)
    result = Augment(settings, 64)(batch)
    assert float(grey(result).min()) >= -1e-5 and float(grey(result).max()) <= 1 + 1e-5
    assert torch.equal(result.masks, Augment(AugmentSettings(), 64)(batch).masks)
    assert result.frames.isfinite().all()
