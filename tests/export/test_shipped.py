"""The shipped checkpoint: what is in it, and how it is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medsam2.export.shipped import main
from medsam2.model.build import load_model
from medsam2.model.sizes import NANO_ASSET


def test_shipped_checkpoint_says_where_it_comes_from() -> None:
    loaded = load_model("nano")
    assert loaded.spec.image_size == 128
    for key in ("data", "recipe", "commit", "licence"):
        assert getattr(loaded.provenance, key), key
    assert NANO_ASSET.stat().st_size < 10e6
    assert all(torch.isfinite(value).all() for value in loaded.sam.state_dict().values())


def test_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(str(tmp_path), str(tmp_path / "asset.safetensors"))
    assert "last phase" in capsys.readouterr().err
    assert not (tmp_path / "asset.safetensors").exists()
