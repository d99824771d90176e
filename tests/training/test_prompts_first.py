"""The first phase of pretraining: targets follow from prompts, and the loop learns from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medsam2.model.build import LoadedModel, ModelSpec, build_sam
from medsam2.prompts.regions import tight_boxes
from medsam2.training.fit import fit
from medsam2.training.prompts_first import DISK_RADIUS, PromptsFirst
from medsam2.training.settings import TrainSettings


def config(output: Path) -> dict[str, Any]:
    return {
        "data": {"shards": "none"}, "output": str(output), "start": "random",
        "module": "medsam2.training.prompts_first.PromptsFirst",
        "adaptation": {"train": ["prompt_encoder", "mask_decoder"]},
        "trainer": {"accelerator": "cpu", "max_steps": 3, "log_every": 1, "progress": "none", "threads": 1},
        "loss": {"focal": 2, "focal_gamma": 0, "resolution": 32, "presence": 0},
    }  # fmt: skip


def test_targets_are_what_the_prompts_say(tmp_path: Path) -> None:
    spec = ModelSpec("hiera_nano", "2.1", 128)
    module = PromptsFirst(LoadedModel(build_sam(spec), spec), TrainSettings.model_validate(config(tmp_path)))
    seeds = torch.arange(64) * 17
    disks = module.draw("click", seeds).flatten(1).sum(1)
    expected = 3.14159 * (DISK_RADIUS * 128) ** 2
    assert ((disks - expected).abs() < 0.1 * expected).all()
    ellipses = module.draw("box", seeds)
    boxes = tight_boxes(ellipses)
    area = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    assert torch.allclose(ellipses.flatten(1).sum(1) / area, torch.tensor(0.785), atol=0.1)
    assert torch.equal(module.draw("box", seeds[5:6]), ellipses[5:6])


def test_phase_runs_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fit(config(tmp_path / "run"))
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    assert "mask_decoder" in capsys.readouterr().out
