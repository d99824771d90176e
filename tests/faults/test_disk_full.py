"""No space while saving: a clear error, and the checkpoint of before."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from ranks import SMALLEST
from small_disk import small_disk
from small_shards import build

from medsam2.config import compose
from medsam2.errors import UserError
from medsam2.training.fit import fit
from medsam2.training.launch.shutdown import to_user_error
from medsam2.training.run_folder.checkpoints import AtomicCheckpointIO, checkpoint_bytes

MEGABYTE = torch.zeros(250_000)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_disk_with_room_for_one_checkpoint_and_a_half_keeps_the_first(tmp_path: Path) -> None:
    writer = AtomicCheckpointIO()
    with small_disk(tmp_path / "disk", "1500k") as disk:
        path = disk / "last.ckpt"
        writer.save_checkpoint({"global_step": 1, "weights": MEGABYTE}, path)
        with pytest.raises(UserError, match=rf"no space to save last\.ckpt in {disk}: 1\.0 MB are needed, 0\.5 MB"):
            writer.save_checkpoint({"global_step": 2, "weights": MEGABYTE}, path)
        assert names(disk) == ["last.ckpt"]
        assert torch.load(path, weights_only=True)["global_step"] == 1


def test_a_disk_that_fills_up_during_the_write_keeps_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something else writes there, too: the look before the write has found enough."""
    writer = AtomicCheckpointIO()
    with small_disk(tmp_path / "disk", "1500k") as disk:
        path = disk / "last.ckpt"
        writer.save_checkpoint({"global_step": 1, "weights": MEGABYTE}, path)
        monkeypatch.setattr("medsam2.training.run_folder.checkpoints.refuse_full", _second_look())
        with pytest.raises(UserError, match=r"last\.ckpt of before are intact"):
            writer.save_checkpoint({"global_step": 2, "weights": MEGABYTE}, path)
        assert names(disk) == ["last.ckpt"]
        assert torch.load(path, weights_only=True)["global_step"] == 1


def _second_look() -> object:
    from medsam2.training.run_folder.checkpoints import refuse_full

    looks: list[int] = []

    def look(path: Path, needed: int) -> None:
        looks.append(needed)
        if len(looks) > 1:
            refuse_full(path, needed)

    return look


def test_a_run_on_a_full_disk_ends_with_the_bytes_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """A nano run's checkpoint has about 50 MB: weights and two moments."""
    shards = build(tmp_path / "shards")
    steps = ("trainer.max_steps=3", "trainer.checkpoint_every=1", "trainer.progress=none", "resume=auto")
    with small_disk(tmp_path / "disk", "125m") as disk:
        words = [*SMALLEST, *steps, f"data.shards={shards}", f"output={disk / 'run'}"]
        with pytest.raises(UserError, match=r"no space to save last\.ckpt.* MB are needed.*last\.ckpt and previous"):
            fit(compose("train", words))
        folder = disk / "run" / "checkpoints"
        assert names(folder) == ["last.ckpt", "previous.ckpt"]
        assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2
        (folder / "previous.ckpt").unlink()
        fit(compose("train", words))
        assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 3


def test_size_counts_the_tensors_of_weights_and_optimiser() -> None:
    nested = {"a": torch.zeros(3), "b": [{"c": torch.zeros(2, dtype=torch.int64)}, (torch.zeros(1),)], "d": "text"}
    assert checkpoint_bytes(nested) == 12 + 16 + 4


def test_what_else_could_not_be_written_is_named_too(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "metrics.csv"))
    with pytest.raises(UserError, match=r"metrics\.csv cannot be written \(No space left on device\).*MB free"):
        raise to_user_error(full, None, None, tmp_path)  # type: ignore[arg-type]


def test_the_first_cause_is_told_and_not_what_followed_from_it(tmp_path: Path) -> None:
    try:
        try:
            raise UserError("the disk is full; make room.")
        except UserError:
            raise OSError(errno.ENOSPC, "the logger could not write either")  # noqa: B904
    except OSError as error:
        assert str(to_user_error(error, None, None, tmp_path)) == "the disk is full; make room."  # type: ignore[arg-type]
