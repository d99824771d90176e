"""Validation sees forgetting and collapse: the start's scores beside ours, obedience to prompts, the trade-off."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from pydantic import ValidationError

from medsam2.adaptation.lora import official_state
from medsam2.cases.case import Label
from medsam2.config import compose
from medsam2.evaluation.loaded_case import LoadedCase
from medsam2.model.build import load_model
from medsam2.training.callbacks import validation
from medsam2.training.callbacks.validation import (
    InterpolateAtEnd,
    best_monitor,
    best_share,
    overlaps_target_most,
    probe_obedience,
    start_scores,
    tradeoff,
    with_tradeoff,
)
from medsam2.training.fit import callbacks, fit
from medsam2.training.run_folder.checkpoints import checkpoint_callbacks
from medsam2.training.settings import TradeoffSettings, TrainSettings, ValidationSettings

# ---------------------------------------------------------------------------------------------------- trade-off

VALUES = {"val/gain": 0.8, "val/gain_start": 0.2, "val/retention": 0.6, "val/retention_start": 0.7}


def test_the_tradeoff_is_gain_less_what_is_lost_beyond_what_is_allowed() -> None:
    assert tradeoff(VALUES, TradeoffSettings()) == pytest.approx(0.6 - 0.1)
    assert tradeoff(VALUES, TradeoffSettings(gain=2, retention=3, allowed=0.04)) == pytest.approx(1.2 - 3 * 0.06)
    better = {**VALUES, "val/retention": 0.9}
    assert tradeoff(better, TradeoffSettings()) == pytest.approx(0.6), "old data getting better is no gain"
    assert tradeoff({"val/gain": 0.8}, TradeoffSettings()) == pytest.approx(0.8), "nothing old, start not known"


def test_the_best_checkpoint_goes_by_the_tradeoff_where_there_is_one() -> None:
    assert best_monitor(TradeoffSettings(), 4) == ("val/tradeoff", "max")
    assert best_monitor(None, 4) == ("val/dsc", "max")
    assert best_monitor(None, 0) == ("val/loss", "min")


def test_the_start_stands_beside_our_figures() -> None:
    start = {"val/gain_start": 0.2, "val/retention_start": 0.7, "val/obedience_start": 1.0}
    found = with_tradeoff({"val/gain": 0.8, "val/retention": 0.6}, start, ValidationSettings(tradeoff={}))
    assert found == {**VALUES, "val/tradeoff": pytest.approx(0.5)}
    assert "val/tradeoff" not in with_tradeoff({}, start, ValidationSettings())


@pytest.mark.parametrize("wrong", [{"tradeoff": {}}, {"general": ["x"]}])
def test_what_needs_whole_cases_is_refused_without_them(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"set validation\.cases"):
        ValidationSettings.model_validate({"cases": 0, **wrong})


def settings(**more: Any) -> TrainSettings:
    return TrainSettings.model_validate({"data": {"shards": "x"}, "output": "x", **more})


def test_early_stopping_and_interpolation_come_only_where_they_are_asked_for() -> None:
    def kinds(asked: TrainSettings, validated: bool = True) -> set[type]:
        return {type(callback) for callback in callbacks(asked, Path("x"), None, validated)}

    assert not kinds(settings()) & {EarlyStopping, InterpolateAtEnd}
    asked = settings(validation={"patience": 3, "tradeoff": {}}, retention={"interpolate": [0.5]})
    assert kinds(asked) >= {EarlyStopping, InterpolateAtEnd}
    assert InterpolateAtEnd not in kinds(asked, validated=False)
    *_, stopping = checkpoint_callbacks(asked)
    assert isinstance(stopping, EarlyStopping)
    assert (stopping.monitor, stopping.mode, stopping.patience) == ("val/tradeoff", "max", 3)
    with pytest.raises(ValidationError, match=r"retention\.interpolate"):
        settings(validation={"cases": 0}, retention={"interpolate": [0.5]})


def test_of_equally_good_shares_the_one_nearest_to_the_start_is_kept() -> None:
    rows = [{"share": share, "val/dsc": dsc} for share, dsc in ((0.3, 0.5), (0.5, 0.9), (0.7, 0.9), (1.0, 0.8))]
    assert best_share(rows, "val/dsc") == 0.5


# ---------------------------------------------------------------------------------------------------- the start


def trainer(step: int = 0) -> Any:
    strategy = SimpleNamespace(broadcast=lambda value: value)
    data = SimpleNamespace(validation_cases=[])
    return SimpleNamespace(strategy=strategy, is_global_zero=True, global_step=step, datamodule=data)


def test_the_start_is_scored_once_and_read_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, calls = settings().model_copy(update={"output": str(tmp_path)}), []
    tracker: Any = SimpleNamespace()

    def probe_all(*_: Any) -> dict[str, float]:
        calls.append(1)
        return {"val/retention": 0.7, "val/gain": 0.1, "val/obedience": 1.0, "val/dsc": 0.4}

    monkeypatch.setattr(validation, "probe_all", probe_all)
    expected = {"val/retention_start": 0.7, "val/gain_start": 0.1, "val/obedience_start": 1.0}
    assert start_scores(trainer(), own, tracker) == expected
    assert start_scores(trainer(5), own, tracker) == expected and len(calls) == 1
    elsewhere = own.model_copy(update={"output": str(tmp_path / "other")})
    assert start_scores(trainer(5), elsewhere, tracker) == {}, "the weights have moved: too late to measure"
    assert start_scores(trainer(), elsewhere.model_copy(update={"start": "random"}), tracker) == {} and len(calls) == 1


# ---------------------------------------------------------------------------------------------------- obedience


def squares() -> LoadedCase:
    """A large and a small object on frame 1, the large one alone on frames 0 and 2."""
    planes = np.zeros((1, 3, 64, 64), np.uint8)
    planes[0, :, 10:40, 10:40] = 1
    planes[0, 1, 44:52, 8:16] = 2
    objects = (Label(1, "organ"), Label(2, "lesion"))
    frames = torch.zeros(3, 1, 64, 64, dtype=torch.uint8)
    return LoadedCase(frames, planes, objects, (1.0, 1.0, 1.0), "volume", "CT", "d", "c", "p")


def predictor(answer: Any) -> type:
    """A class in the place of `Predictor` whose masks are `answer(prompt, large, small)`."""

    class Fake:
        def __init__(self, tracker: Any) -> None:
            pass

        def predict(self, frames: Any, prompts: Any, direction: str) -> Any:
            assert len(frames) == 1
            large, small = squares().mask(0)[1], squares().mask(1)[1]
            masks = np.stack([answer(prompt, large, small) for prompt in prompts])
            return SimpleNamespace(masks=torch.from_numpy(masks[:, None]))

    return Fake


def obedient(prompt: Any, large: np.ndarray, small: np.ndarray) -> np.ndarray:
    return small if prompt.box[1] >= 44 else large


@pytest.mark.parametrize(
    ("answer", "boxes"),
    [
        (obedient, [True, True]),
        (lambda prompt, large, small: large, [True, False]),
        (lambda prompt, large, small: np.zeros_like(large), [False, False]),
        (lambda prompt, large, small: large | small, [True, False]),
    ],
    ids=["obedient", "always the dominant organ", "never anything", "everything at once"],
)
def test_obedience_tells_a_collapsed_model_from_one_that_listens(
    monkeypatch: pytest.MonkeyPatch, answer: Any, boxes: list[bool]
) -> None:
    monkeypatch.setattr(validation, "Predictor", predictor(answer))
    assert probe_obedience(SimpleNamespace(), squares()) == boxes  # type: ignore[arg-type]


def test_a_case_that_never_shows_two_objects_has_no_obedience() -> None:
    case = squares()
    alone = LoadedCase(**{**vars(case), "objects": case.objects[:1]})
    apart = LoadedCase(**{**vars(case), "planes": np.where(case.planes == 2, 0, case.planes)})
    assert probe_obedience(SimpleNamespace(), alone) == probe_obedience(SimpleNamespace(), apart) == []  # type: ignore[arg-type]


def test_own_object_must_overlap_strictly_most() -> None:
    truths = np.stack([squares().mask(0)[1], squares().mask(1)[1]])
    assert overlaps_target_most(truths[1], truths, 1) and not overlaps_target_most(truths[1], truths, 0)
    assert not overlaps_target_most(np.zeros_like(truths[0]), truths, 0)


# ---------------------------------------------------------------------------------------------------- a whole run


@pytest.mark.slow
def test_a_run_shows_retention_beside_the_start_and_keeps_the_best_interpolation(
    phantom_shards: Path, tiny_arguments: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    given = [
        *tiny_arguments, f"data.shards={phantom_shards}", f"output={run}", "adaptation=lora_encoder_full_decoder",
        "start=nano", "retention=[distillation,l2]", "retention.interpolate=[0.4]", "retention.new=[CT]",
        "trainer.max_steps=2", "trainer.val_every=2",
        "validation.tradeoff={gain: 1, retention: 1}", "ema=null", "trainer.progress=none",
    ]  # fmt: skip
    fit(compose("train", given))
    with open(run / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/tradeoff"]]
    start = json.loads((run / "start_scores.json").read_text())
    assert len(rows) == 1 and start["val/retention_start"] > 0
    assert float(rows[0]["val/retention_start"]) == pytest.approx(start["val/retention_start"])
    assert 0 <= float(rows[0]["val/obedience"]) <= 1
    gain = float(rows[0]["val/gain"]) - start["val/gain_start"]
    lost = min(float(rows[0]["val/retention"]) - start["val/retention_start"], 0)
    assert float(rows[0]["val/tradeoff"]) == pytest.approx(gain + lost, abs=1e-5)

    table = json.loads((run / "interpolation.json").read_text())
    assert [row["share"] for row in table["shares"]] == [0.4, 1.0]
    assert table["shares"][1]["val/retention"] == pytest.approx(float(rows[0]["val/retention"]), abs=2e-3)
    kept = load_model(run / "checkpoints" / "interpolated.ckpt")
    assert kept.provenance.interpolated == table["best"] and kept.provenance.adapter is None
    nano = load_model("nano").sam.state_dict()
    end = official_state(load_model(run / "checkpoints" / "last.ckpt").sam)
    for name, value in kept.sam.state_dict().items():
        torch.testing.assert_close(value, torch.lerp(nano[name], end[name], table["best"]), rtol=1e-4, atol=1e-5)
