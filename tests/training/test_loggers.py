"""Loggers: which there are, what they write, and what callbacks hand to them."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor
from PIL import Image

from medsam2.config import compose, validate
from medsam2.errors import UserError
from medsam2.training.callbacks.log import LossByKind, Throughput, ValidationTable, peak_memory
from medsam2.training.callbacks.pictures import Candidate, Shown
from medsam2.training.callbacks.validation import ScoreRow, by_structure, mean_scores
from medsam2.training.fit import callbacks, make_loggers
from medsam2.training.loggers.csv_log import CsvLog, read_rows
from medsam2.training.loggers.tensorboard_log import TensorBoardLog
from medsam2.training.loggers.wandb_log import WandbLog, without_paths
from medsam2.training.settings import TrainSettings


def settings(*overrides: str) -> TrainSettings:
    composed = compose("train", ["data.shards=/data/mine/shards", "output=/home/me/runs/first", *overrides])
    return validate(TrainSettings, composed, "the training configuration")


@pytest.mark.parametrize(
    ("choice", "names"), [("csv", []), ("wandb", ["wandb"]), ("[csv,wandb,tensorboard]", ["wandb", "tensorboard"])]
)
def test_one_or_several_loggers_are_named(choice: str, names: list[str]) -> None:
    assert list(settings(f"logger={choice}").logger) == names


def test_an_unknown_logger_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"logger=wandbb.*choose one of csv, tensorboard, wandb.*'wandb'"):
        settings("logger=wandbb")


def test_making_loggers_writes_nothing_and_the_csv_is_always_there(tmp_path: Path) -> None:
    made = make_loggers(settings("logger=[wandb,tensorboard]", f"output={tmp_path}"), tmp_path, None)
    assert [type(logger) for logger in made] == [CsvLog, WandbLog, TensorBoardLog]
    assert list(tmp_path.iterdir()) == []
    assert [hasattr(logger, "log_pictures") for logger in made] == [False, True, True]


def test_any_class_may_be_a_logger_and_one_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    own = "+logger.mine={_target_: lightning.pytorch.loggers.CSVLogger, save_dir: logs}"
    assert type(make_loggers(settings(own), tmp_path, None)[1]).__name__ == "CSVLogger"
    with pytest.raises(UserError, match=r"logger\.mine: .*no_such_module"):
        make_loggers(settings("+logger.mine={_target_: no_such_module.Logger}"), tmp_path, None)


def test_any_lightning_callback_joins_ours_and_another_class_is_refused(tmp_path: Path) -> None:
    stats = "+callbacks.stats={_target_: lightning.pytorch.callbacks.DeviceStatsMonitor}"
    kinds = {type(callback) for callback in callbacks(settings(stats), tmp_path, None, True)}
    assert kinds >= {DeviceStatsMonitor, LearningRateMonitor, Throughput}
    kinds = {type(callback) for callback in callbacks(settings("~callbacks.throughput"), tmp_path, None, True)}
    assert Throughput not in kinds
    wrong = settings("+callbacks.mine={_target_: pathlib.Path}")
    with pytest.raises(UserError, match=r"callbacks\.mine is a PosixPath and not a Lightning Callback"):
        callbacks(wrong, tmp_path, None, True)


def webp(colour: tuple[int, int, int]) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(content, "WEBP", lossless=True)
    return content.getvalue()


def test_tensorboard_has_figures_and_the_picture_itself(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, log = make_loggers(settings("logger=tensorboard", f"output={tmp_path}"), tmp_path, None)
    log.log_metrics({"train/loss": 4.0}, 0)
    liver = Candidate(False, "CT", "liver", "a", "h1", "0a1b2c3d4e", 0)
    log.log_pictures([Shown(liver, 0.5, 9, webp((250, 10, 10)))], 2)  # type: ignore[attr-defined]
    log.finalize("success")
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(0, 4.0)]
    (image,) = found.Images("pictures/CT_liver_0a1b2c3d_0")
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert pixels.shape == (8, 12, 3) and (pixels == (250, 10, 10)).all()


def test_a_resumed_run_keeps_its_wandb_id_whatever_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb" / "offline-run-20261201_101010-my-run").mkdir(parents=True)
    monkeypatch.setenv("WANDB_NAME", "mine")
    log = WandbLog(str(tmp_path), 1, 1)
    assert (log._wandb_init["id"], log._wandb_init["name"]) == ("my-run", "mine")


def test_what_goes_to_wandb_has_neither_folders_nor_secrets() -> None:
    config = settings("resume=/home/me/runs/first/checkpoints/last.ckpt", "start=/home/me/base.pt",
                      "validation.general=[s3://key@secret/data/general, 'https://me:word@secret/s?Signature=hidden']",
                      ).model_dump(mode="json")  # fmt: skip
    text = str(without_paths(config))
    assert not any(word in text for word in ("/home", "/data", "secret", "hidden", "word"))
    assert all(word in text for word in ("first", "last.ckpt", "general", "base.pt", "shards"))
    assert without_paths(config)["optim"] == config["optim"]


def test_a_service_that_raises_is_left_alone_and_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def begin(**options: Any) -> None:
        calls.append(options.get("mode"))
        raise BrokenPipeError("the service is gone")

    monkeypatch.setattr("wandb.init", begin)
    log = WandbLog(str(tmp_path), 1, 1)
    for step in range(3):
        log.log_metrics({"train/loss": 1.0}, step)
    assert calls == [None, "offline"]
    assert capsys.readouterr().out.count("left alone from here on (the service is gone)") == 1
    assert "the service is gone" in (tmp_path / "events.csv").read_text()


# ---------------------------------------------------------------------------------------------------- callbacks


class Kept:
    """Stands for a logger, and keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, values))

    def save(self) -> None:
        pass


def test_the_loss_of_a_kind_is_the_mean_of_its_batches_and_not_repeated() -> None:
    logger, callback, module = Kept(), LossByKind(every=3), SimpleNamespace(kind_losses={})
    drawn = [("box", 1.0), ("box", 3.0), ("click", 5.0), ("click", 7.0), ("click", 8.0), ("click", 9.0)]
    for step, (kind, loss) in enumerate(drawn, 1):
        trainer: Any = SimpleNamespace(global_step=step, loggers=[logger])
        module.kind_losses.setdefault(kind, []).append(torch.tensor(loss))
        callback.on_train_batch_end(trainer, module, None, None, step - 1)
    assert logger.rows == [
        (2, {"train/loss_box": 2.0, "train/loss_click": 5.0}),
        (5, {"train/loss_click": 8.0}),
    ]


def test_accumulated_batches_are_averaged_and_logged_once_a_step() -> None:
    logger, callback, module = Kept(), LossByKind(every=1), SimpleNamespace(kind_losses={})
    for done, loss in ((0, 1.0), (1, 3.0), (1, 5.0), (2, 7.0)):  # optimiser steps done after each batch
        trainer: Any = SimpleNamespace(global_step=done, loggers=[logger])
        module.kind_losses.setdefault("box", []).append(torch.tensor(loss))
        callback.on_train_batch_end(trainer, module, None, None, 0)
    assert logger.rows == [(0, {"train/loss_box": 2.0}), (1, {"train/loss_box": 6.0})]


def test_throughput_counts_neither_validation_nor_checkpoints_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    found: dict[str, float] = {}
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(global_step=1, loggers=[], strategy=strategy, datamodule=None)
    module: Any = SimpleNamespace(log_dict=lambda values, batch_size: found.update(values), batch_ended=0.0)
    batch = SimpleNamespace(keys=("a", "b", "c", "d"))
    callback = Throughput(every=3)
    for step, (wait, work, save) in enumerate([(1, 3, 0), (2, 2, 4), (3, 1, 0)], 1):
        clock[0] += wait
        callback.on_train_batch_start(trainer, module, batch, 0)
        clock[0] += work
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module, None, batch, 0)
        clock[0] += save  # a checkpoint, by a later callback
        module.batch_ended = clock[0]
    assert found["train/clips_per_second"] == pytest.approx(12 / 16) and found["train/data_wait"] == 6 / 16
    assert 0.05 < found["train/memory_gb"] < 100
    callback.on_validation_end(trainer, module)
    clock[0] += 100  # the validation and what follows it
    for step in (4, 5, 6):
        callback.on_train_batch_start(trainer, module, batch, 0)
        clock[0] += 2
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module, None, batch, 0)
        module.batch_ended = clock[0]
    assert found["train/clips_per_second"] == pytest.approx(12 / 6) and found["train/data_wait"] == 0


def test_peak_memory_is_what_the_kernel_says() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux's /proc")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert peak_memory(torch.device("cpu")) == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)


def test_rank_0_alone_shows_a_bar() -> None:
    from lightning.pytorch.callbacks import RichProgressBar

    from medsam2.training.callbacks.log import progress_callbacks

    for zero in (True, False):
        (bar,) = progress_callbacks(settings("trainer.progress=bar"))
        assert isinstance(bar, RichProgressBar)
        bar.setup(SimpleNamespace(is_global_zero=zero, loggers=[]), None, "fit")  # type: ignore[arg-type]
        assert bar.is_enabled == zero


# --------------------------------------------------------------------------------------------- validation tables


ROWS = [
    ScoreRow("box", "a", "c1", 0, "liver", 0.8, modality="CT"),
    ScoreRow("box", "b", "c2", 0, "liver", 0.4, modality="MR"),
    ScoreRow("box", "a", "c3", 1, "lesion", 0.5, modality="CT"),
    ScoreRow("box", "g", "c4", 0, "liver", 0.1, old=True, general=True, modality="CT"),
]


def test_scores_are_averaged_by_modality_and_structure() -> None:
    found = mean_scores(ROWS)
    assert found["val/CT/dsc"] == pytest.approx(0.65) and found["val/MR/dsc"] == pytest.approx(0.4)
    assert found["val/CT/liver/dsc"] == pytest.approx(0.8) and found["val/liver/dsc"] == pytest.approx(0.6)
    assert "val/MR/lesion/dsc" not in found
    assert [tuple(row.values()) for row in by_structure(ROWS, 7)] == [
        (7, "box", "own", "CT", "lesion", 1, 1, 0.5),
        (7, "box", "own", "CT", "liver", 1, 1, 0.8),
        (7, "box", "own", "MR", "liver", 1, 1, 0.4),
        (7, "box", "general", "CT", "liver", 1, 1, 0.1),
    ]


def test_validation_csv_goes_on_after_a_resume_without_what_is_done_again(tmp_path: Path) -> None:
    def validated(table: ValidationTable, step: int, dsc: float) -> None:
        trainer: Any = SimpleNamespace(sanity_checking=False, global_step=step)
        table.on_validation_end(trainer, SimpleNamespace(scores=[ScoreRow("box", "a", "c", 0, "liver", dsc)]))

    first = ValidationTable(tmp_path)
    for step, dsc in ((2, 0.2), (4, 0.4), (6, 0.6)):
        validated(first, step, dsc)
    validated(ValidationTable(tmp_path), 4, 0.1 + 0.2)
    found = read_rows(tmp_path / "validation.csv")
    assert [(int(row["step"]), float(row["dsc"])) for row in found] == [(2, 0.2), (4, 0.1 + 0.2)]


def test_a_run_writes_validation_by_modality_and_structure(tiny_run: Path) -> None:
    rows = read_rows(tiny_run / "validation.csv")
    assert {row["step"] for row in rows} == {"3", "6"} and {row["modality"] for row in rows} == {"CT", "ENDOSCOPY"}
    with open(tiny_run / "metrics.csv", newline="") as file:
        last = [row for row in csv.DictReader(file) if row["val/dsc"]][-1]
    for row in rows[-2:]:
        assert float(last[f"val/{row['modality']}/{row['structure']}/dsc"]) == pytest.approx(float(row["dsc"]))
