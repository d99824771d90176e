from __future__ import annotations

import numpy as np
import pytest
import torch
from packed import pack
from torch import Tensor

from medsam2.data.augment.warp import AffineMap, reduce_frames, resize_frames, resize_masks, warp, warp_torch
from medsam2.data.batch import PackedMasks

TURN = AffineMap(xx=0.85, xy=-0.3, x0=0.05, yx=0.3, yy=0.85, y0=-0.1)
MAPS = {
    "identity": AffineMap(),
    "mirrored": AffineMap(xx=-1.0),
    "turned": TURN,
    "turned and mirrored": TURN.after(AffineMap(yy=-1.0)),
    "enlarged": AffineMap(xx=0.3, x0=0.4, yy=0.35, y0=-0.2),
    "seen from afar": AffineMap(xx=1.4, yy=1.3),
    "half outside": AffineMap(x0=0.9, y0=0.3),
}


def clip(height: int, width: int, channels: int, frames: int = 5) -> tuple[Tensor, Tensor]:
    """Smooth noise, and two objects that move and overlap."""
    generator = torch.Generator().manual_seed(height + channels)
    rough = torch.rand(frames, channels, 12, 12, generator=generator) * 255
    image = torch.nn.functional.interpolate(rough, (height, width), mode="bicubic").clamp(0, 255).to(torch.uint8)
    rows, columns = torch.arange(height)[:, None] / height, torch.arange(width)[None, :] / width
    times = torch.arange(frames)[:, None, None] / 20
    large = (rows - 0.5 + times) ** 2 + (columns - 0.5) ** 2 < 0.1
    small = (rows - 0.3) ** 2 + (columns - 0.3 - times) ** 2 < 0.02
    return image, torch.stack([large, small])


def packed(masks: Tensor) -> PackedMasks:
    return PackedMasks(pack(masks), len(masks))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width", "size"), [(96, 96, 96), (90, 121, 64), (70, 50, 128), (300, 260, 96)])
def test_both_backends_give_the_same_picture(height: int, width: int, size: int, channels: int) -> None:
    frames, masks = clip(height, width, channels)
    for name, affine in MAPS.items():
        values, warped = warp(frames, packed(masks), affine, size)
        expected, expected_masks = warp_torch(reduce_frames(frames, affine.zoom, size), packed(masks), affine, size)
        assert values.dtype == expected.dtype == torch.uint8 and values.shape == expected.shape
        difference = (values.int() - expected.int()).abs()
        assert float(difference.float().mean()) < 0.5, name
        assert float((difference > 4).float().mean()) < 2e-3, f"{name}: only pixels on the image's edge may differ"
        assert float((warped == expected_masks).float().mean()) >= 0.998, name
        assert bool(warped.any()) == bool(expected_masks.any())


@pytest.mark.parametrize("backend", [warp, warp_torch])
@pytest.mark.parametrize("count", [1, 2, 8, 9, 17])
def test_any_number_of_objects_is_warped_object_by_object(count: int, backend: object) -> None:
    """Objects travel as bits, eight to a plane."""
    assert callable(backend)
    frames, pair = clip(64, 80, 1)
    masks = torch.stack([pair[i % 2].roll(3 * i, -1) for i in range(count)])
    _, together = backend(frames, packed(masks), TURN, 48)
    for i in range(count):
        _, alone = backend(frames, packed(masks[i : i + 1]), TURN, 48)
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("frames", [1, 2, 4, 7, 9, 17])
def test_any_number_of_frames_is_warped_frame_by_frame(frames: int) -> None:
    """Frames travel in groups (four as channels, eight masks as bits); none is lost, swapped or mixed."""
    image, masks = clip(64, 80, 1, frames)
    image = image // 2 + 5 * torch.arange(frames, dtype=torch.uint8)[:, None, None, None]
    together = warp(image, packed(masks), TURN, 48)
    for t in range(frames):
        alone = warp(image[t : t + 1], packed(masks[:, t : t + 1]), TURN, 48)
        assert torch.equal(together[1][:, t], alone[1][:, 0])
        assert int((together[0][t].int() - alone[0][0].int()).abs().max()) <= 1


def test_padding_and_interleaving_change_nothing() -> None:
    """A clip cut out of a zero-padded batch, or stored as [T, H, W, 3], is the clip itself."""
    for channels in (1, 3):
        frames, masks = clip(60, 75, channels)
        padded = torch.zeros(5, channels, 96, 100, dtype=torch.uint8)
        padded[..., :60, :75] = frames
        wide = torch.zeros(2, 5, 96, 100, dtype=torch.bool)
        wide[..., :60, :75] = masks
        interleaved = frames.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        expected = warp(frames, packed(masks), TURN, 64)
        cut = PackedMasks(pack(wide)[..., :60, :75], 2)
        for stored in ((padded[..., :60, :75], cut), (interleaved, packed(masks))):
            values, warped = warp(*stored, TURN, 64)
            assert torch.equal(values, expected[0]) and torch.equal(warped, expected[1])


def test_a_grey_clip_stored_as_colour_is_warped_like_a_grey_one() -> None:
    frames, masks = clip(60, 75, 1)
    stored = frames.permute(0, 2, 3, 1).repeat(1, 1, 1, 3).permute(0, 3, 1, 2)
    expected, _ = warp(frames, packed(masks), TURN, 64)
    assert torch.equal(warp(stored[:, :1], packed(masks), TURN, 64)[0], expected)


@pytest.mark.parametrize("backend", [warp, warp_torch])
def test_the_identity_map_is_the_plain_resize_up_to_interpolation(backend: object) -> None:
    assert callable(backend)
    frames, masks = clip(96, 110, 1)
    values, warped = backend(frames, packed(masks), AffineMap(), 96)
    assert torch.equal(warped, resize_masks(masks, 96))
    expected = torch.nn.functional.interpolate(frames.float(), (96, 96), mode="bilinear")
    assert float((values.float() - expected).abs().max()) <= 1.0


def test_a_mirrored_clip_of_the_models_size_is_exact() -> None:
    frames, masks = clip(64, 64, 3)
    values, warped = warp(frames, packed(masks), AffineMap(xx=-1.0), 64)
    assert torch.equal(values, frames.flip(-1)) and torch.equal(warped, masks.flip(-1))


def test_outside_the_image_is_black_and_its_border_is_not_darkened() -> None:
    frames = torch.full((5, 1, 60, 60), 200, dtype=torch.uint8)
    masks = torch.ones(1, 5, 60, 60, dtype=torch.bool)
    values, warped = warp(frames, packed(masks), AffineMap(xx=1.5, yy=1.2, x0=0.1), 128)
    assert set(np.unique(values.numpy()).tolist()) == {0, 200}
    assert torch.equal(warped[0], values[:, 0] == 200)


def test_a_large_reduction_under_rotation_does_not_alias() -> None:
    stripes = (torch.arange(512) % 2 * 255).to(torch.uint8).expand(1, 1, 512, 512)
    turned = AffineMap(xx=0.9, xy=-0.1, yx=0.1, yy=0.9)
    values, _ = warp(stripes, packed(torch.zeros(1, 1, 512, 512, dtype=torch.bool)), turned, 64)
    assert float(values.float().std()) < 0.1 * 255


def test_the_plain_resize_keeps_its_size_when_there_is_nothing_to_do() -> None:
    frames, masks = clip(64, 64, 1)
    values, warped = resize_frames(frames, 64, 64), resize_masks(masks, 64)
    assert torch.equal(values, frames) and torch.equal(warped, masks)
