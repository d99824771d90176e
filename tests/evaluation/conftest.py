"""Two checkpoints of random weights in the shipped format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medsam2.model.build import ModelSpec, build_sam, save_asset


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """`before.safetensors` and `after.safetensors`: nano with random weights."""
    folder = tmp_path_factory.mktemp("checkpoints")
    spec = ModelSpec("hiera_nano", image_size=128)
    for seed, name in enumerate(("before", "after")):
        torch.manual_seed(seed)
        save_asset(folder / f"{name}.safetensors", build_sam(spec).state_dict(), spec, {})
    return folder / "before.safetensors", folder / "after.safetensors"
