from __future__ import annotations

import torch

from medsam2.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise


def test_grey_and_colour_frames_become_normalised_rgb_of_the_models_size() -> None:
    grey = torch.full((2, 1, 30, 50), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    for frames in (grey, grey.expand(-1, 3, -1, -1)):
        result = normalise(frames, 16)
        assert result.shape == (2, 3, 16, 16) and result.dtype == torch.float32
        assert torch.allclose(result, expected[None, :, None, None].expand_as(result), atol=1e-5)


def test_fine_stripes_do_not_alias_when_reduced() -> None:
    stripes = (torch.arange(256) % 2 * 255).to(torch.uint8).expand(1, 1, 256, 256)
    reduced = normalise(stripes, 32)[0, 0]
    assert float(reduced[:, 2:-2].std()) < 0.05
