from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medsam2.data.augment import augment, warp
from medsam2.data.augment.augment import (
    add_noise,
    apply_table,
    blur,
    lower_resolution,
    make_table,
    mean_intensity,
    mix_channels,
)
from medsam2.data.settings import AugmentSettings
from medsam2.pixels import standardise


def noise(channels: int, frames: int = 2, size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.randint(0, 256, (frames, channels, size, size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_blur_and_lower_resolution_keep_the_mean_and_lose_detail(channels: int) -> None:
    values = noise(channels)
    for result in (blur(values, 1.5), lower_resolution(values, 0.3)):
        assert result.shape == values.shape and result.dtype == torch.uint8
        assert float(result.float().mean()) == pytest.approx(float(values.float().mean()), abs=1.5)
        assert float(result.float().std()) < 0.5 * float(values.float().std())
    assert torch.equal(blur(values, 0.0), values) and torch.equal(lower_resolution(values, 1.0), values)


def test_noise_has_the_deviation_that_was_asked_for_and_belongs_to_the_seed() -> None:
    flat = torch.full((4, 1, 128, 128), 128, dtype=torch.uint8)
    for deviation in (0.01, 0.05):
        noisy = add_noise(flat, deviation, 7).float()
        assert float(noisy.std()) == pytest.approx(255 * deviation, rel=0.05)
        assert float(noisy.mean()) == pytest.approx(128, abs=0.3)
    one, other = add_noise(flat, 0.05, 7), add_noise(flat, 0.05, 8)
    assert torch.equal(one, add_noise(flat, 0.05, 7)) and not torch.equal(one, other)
    frames = add_noise(flat, 0.05, 7).float()[:, 0].flatten(1)
    assert float(torch.corrcoef(frames).fill_diagonal_(0).abs().max()) < 0.05, "frames and seeds are independent"


@pytest.mark.parametrize("channels", [1, 3])
def test_the_table_equals_the_same_changes_made_pixel_by_pixel(channels: int) -> None:
    """Contrast, brightness, gamma and light from frame to frame, computed on floats: the table is exact."""
    always = {"probability": 1.0}
    settings = AugmentSettings.model_validate(
        {
            "contrast": {**always, "range": [1.3, 1.3]},
            "brightness": {**always, "range": [0.1, 0.1]},
            "gamma": {**always, "range": [0.7, 0.7]},
            "frame": {**always, "range": [0.1, 0.1]},
        }
    )
    names = ("contrast", "brightness", "gamma", "frame")
    drawn = dict.fromkeys((*names, *(f"{name}_value" for name in names)), 0.0)
    frames, jitter = noise(channels), torch.tensor([0.5, -0.5, 1.0, -1.0])
    values = frames / 255.0
    mean = values.mean()
    values = (((values - mean) * 1.3 + mean + 0.1).clamp(0, 1)) ** 0.7
    values = values * (1 + 0.1 * jitter[:2].view(2, 1, 1, 1)) + 0.05 * jitter[2:].view(2, 1, 1, 1)
    out = torch.empty(2, 3, 64, 64)
    apply_table(frames, make_table(settings, drawn, jitter, mean_intensity(frames)), out)
    assert torch.allclose(out, standardise(values.clamp(0, 1)).expand_as(out), atol=1e-4)


def test_channels_are_mixed_as_the_settings_say() -> None:
    frames = torch.tensor([30, 60, 120], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    drawn = {"greyscale": 0.5, "channel_dropout": 0.5, "channel": 0.4}
    grey = mix_channels(frames, AugmentSettings(greyscale=1.0), drawn)
    assert grey.shape == (1, 1, 8, 8) and grey.unique().tolist() == [70]
    dropped = mix_channels(frames, AugmentSettings(channel_dropout=1.0), drawn)
    assert dropped[0, :, 0, 0].tolist() == [30, 75, 120]
    assert mix_channels(frames, AugmentSettings(), drawn) is frames


def test_the_device_path_gives_the_same_as_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch branch, run on a CPU tensor that says it is elsewhere."""
    for channels in (1, 3):
        frames = blur(noise(channels), 1.0)
        drawn = {"greyscale": 0.9, "channel_dropout": 0.0, "channel": 0.4}
        settings = AugmentSettings(channel_dropout=1.0)
        here = [blur(frames, 1.2), lower_resolution(frames, 0.5)]
        here += [mix_channels(frames, settings, drawn)] if channels == 3 else []
        table, out = torch.rand(2, 256, generator=torch.Generator().manual_seed(0)), torch.empty(2, 3, 64, 64)
        apply_table(frames, table, out)
        mean = float(mean_intensity(frames))
        monkeypatch.setattr(augment, "on_cpu", lambda frames: False)
        monkeypatch.setattr(warp, "on_cpu", lambda frames: False)
        there = [blur(frames, 1.2), lower_resolution(frames, 0.5)]
        there += [mix_channels(frames, settings, drawn)] if channels == 3 else []
        elsewhere = torch.empty_like(out)
        apply_table(frames, table, elsewhere)
        assert torch.allclose(out, elsewhere, atol=1e-6) and mean == pytest.approx(
            float(mean_intensity(frames)), abs=1e-5
        )
        noisy = add_noise(torch.full((2, 1, 128, 128), 128, dtype=torch.uint8), 0.05, 3).float()
        assert float(noisy.std()) == pytest.approx(255 * 0.05, rel=0.05)
        monkeypatch.undo()
        for one, other in zip(here, there, strict=True):
            difference = (one.int() - other.int()).abs().float()
            assert float(difference.mean()) < 0.5 and float(difference.max()) <= 2
