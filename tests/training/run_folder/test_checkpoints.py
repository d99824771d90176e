"""Checkpoints are whole or absent, and metrics.csv goes on after a resume."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from medsam2.errors import UserError
from medsam2.training.fit import refuse_existing_run
from medsam2.training.loggers.csv_log import CsvLog
from medsam2.training.run_folder.checkpoints import AtomicCheckpointIO, resume_path
from medsam2.training.settings import TrainSettings


def settings(output: Path, resume: str | None) -> TrainSettings:
    return TrainSettings.model_validate({"data": {"shards": "x"}, "output": str(output), "resume": resume})


def test_last_checkpoint_becomes_the_previous_one(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "checkpoints" / "last.ckpt"
    io.save_checkpoint({"global_step": 1}, path)
    io.save_checkpoint({"global_step": 2}, path)
    assert torch.load(path, weights_only=True)["global_step"] == 2
    assert torch.load(path.with_name("previous.ckpt"), weights_only=True)["global_step"] == 1
    assert sorted(p.name for p in path.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_failed_save_leaves_the_last_checkpoint_alone(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"global_step": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        io.save_checkpoint({"global_step": 2, "unpicklable": lambda: None}, path)
    assert torch.load(path, weights_only=True)["global_step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_resume_auto_starts_anew_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert resume_path(settings(tmp_path, "auto")) is None
    assert resume_path(settings(tmp_path, None)) is None
    with pytest.raises(UserError, match=r"nowhere\.ckpt"):
        resume_path(settings(tmp_path, str(tmp_path / "nowhere.ckpt")))


@pytest.mark.parametrize("damage", ["flipped bit", "damaged directory", "truncated", "missing"])
def test_damaged_last_checkpoint_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "checkpoints" / "last.ckpt"
    for step in (1, 2):
        io.save_checkpoint({"global_step": step, "weights": torch.zeros(5000)}, path)
    assert resume_path(settings(tmp_path, "auto")) == path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        path.unlink()
        assert resume_path(settings(tmp_path, "auto")) == path.with_name("previous.ckpt")
        return
    if damage == "damaged directory":  # zipfile looks for members at places that the directory names
        content[len(path.read_bytes()) // 2] ^= 1
        at = content.rfind(b"PK\x01\x02")
        content[at + 42 : at + 46] = b"\xff\xff\xff\xff"
    path.write_bytes(content[: len(content) // 3] if damage == "truncated" else content)
    with pytest.warns(UserWarning, match="damaged"):
        assert resume_path(settings(tmp_path, "auto")) == path.with_name("previous.ckpt")


def test_resume_auto_never_begins_anew_over_damaged_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("last", "previous", "best"):
        (folder / f"{name}.ckpt").write_bytes(b"cut off")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(UserError, match=r"last\.ckpt.*start=.*best\.ckpt"):
        resume_path(settings(tmp_path, "auto"))


def test_a_folder_that_only_holds_the_lock_of_a_run_that_never_began_is_free(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    refuse_existing_run(settings(tmp_path, None))
    (tmp_path / "metrics.csv").touch()
    with pytest.raises(UserError, match="not empty"):
        refuse_existing_run(settings(tmp_path, None))


def test_metrics_go_on_and_rows_of_lost_steps_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = CsvLog(path)
    for step in range(6):
        log.log_metrics({"train/loss": step / 3}, step)
    log.save()
    resumed = CsvLog(path, resumed_step=3)
    resumed.log_metrics({"train/loss": 9.5, "val/dsc": 0.5}, 4)
    resumed.save()
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3, 4]
    assert float(rows[1]["train/loss"]) == 1 / 3 and float(rows[4]["val/dsc"]) == 0.5
    assert rows[0]["val/dsc"] == ""
