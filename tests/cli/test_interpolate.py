"""`medsam2 interpolate`: files that load, and nothing written where something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medsam2.cli.interpolate import interpolate
from medsam2.errors import UserError
from medsam2.model.build import load_model


@pytest.fixture
def end(tmp_path: Path) -> Path:
    """The nano with every weight one higher, as a training checkpoint holds it."""
    loaded = load_model("nano")
    state = {f"tracker.sam.{name}": value + 1 for name, value in loaded.sam.state_dict().items()}
    said = {"spec": loaded.spec.to_dict(), "content_hashes": ["new"], "step": 5}
    torch.save({"state_dict": state, "medsam2": said}, tmp_path / "end.ckpt")
    return tmp_path / "end.ckpt"


def test_each_share_becomes_a_checkpoint_that_loads(end: Path, tmp_path: Path) -> None:
    interpolate("nano", str(end), tmp_path / "between", "0.25,0.5")
    assert sorted(path.name for path in (tmp_path / "between").iterdir()) == ["share_0.25.pt", "share_0.5.pt"]
    start = load_model("nano").sam.state_dict()
    for share in (0.25, 0.5):
        found = load_model(tmp_path / "between" / f"share_{share}.pt")
        assert found.provenance.interpolated == share and "new" in found.provenance.content_hashes
        for name, value in found.sam.state_dict().items():
            torch.testing.assert_close(value, start[name] + share, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shares", "message"), [("0.3;0.5", "list of numbers"), ("0.3,2", "2 is not between")])
def test_shares_that_make_no_sense_are_refused_before_anything_is_written(
    end: Path, tmp_path: Path, shares: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        interpolate("nano", str(end), tmp_path / "between", shares)
    assert not (tmp_path / "between").exists()


def test_a_taken_folder_is_left_as_it_is(end: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not empty"):
        interpolate("nano", str(end), tmp_path, "0.5")
    assert [path.name for path in tmp_path.iterdir()] == ["end.ckpt"]
