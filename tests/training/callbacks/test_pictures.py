"""Overlays of fixed validation clips: which, what they show, and what stays on disk."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from medsam2.reporting.style import PREDICTIONS, TRUTH, rgb
from medsam2.training.callbacks.pictures import Candidate, Pictures, Shown, choose, save_pictures
from medsam2.training.report import read_table


def read_pictures(folder: Path) -> pd.DataFrame:
    return read_table(folder / "pictures.csv")


FOUND = [
    Candidate(False, "CT", "liver", "a", "h1", "c1", 0),
    Candidate(False, "CT", "liver", "a", "h2", "c2", 0),
    Candidate(False, "CT", "lesion", "a", "h1", "c1", 1),
    Candidate(False, "CT", "kidney", "a", "h1", "c1", 2),
    Candidate(False, "MR", "heart", "b", "h3", "c3", 0),
    Candidate(True, "US", "valve", "g", "h4", "c4", 0),
]


def test_each_modality_has_its_turn_before_one_has_two() -> None:
    assert [one.structure for one in choose(FOUND, 3)] == ["kidney", "heart", "valve"]
    assert [one.structure for one in choose(FOUND, 9)] == ["kidney", "heart", "valve", "lesion", "liver"]
    assert choose(FOUND, 9)[-1].case == "c1" and choose(FOUND, 0) == []


def test_the_choice_does_not_depend_on_the_order_in_which_ranks_give_candidates() -> None:
    draw = random.Random(0)
    for _ in range(20):
        mixed = draw.sample(FOUND, len(FOUND))
        assert choose([*mixed, mixed[0]], 4) == choose(FOUND, 4)


def test_the_choice_does_not_depend_on_the_salt_of_names() -> None:
    other_salt = [replace(one, case=f"{9 - place}") for place, one in enumerate(FOUND)]
    chosen, again = choose(FOUND, 9), choose(other_salt, 9)
    assert [replace(one, case="") for one in again] == [replace(one, case="") for one in chosen]


# ---------------------------------------------------------------------------------------------------- on disk


def shown(dsc: float, structure: str = "liver") -> Shown:
    return Shown(Candidate(False, "CT", structure, "a", "h1", "0a1b2c3d4e5f", 0), dsc, 9, b"webp %f" % dsc)


def test_the_first_the_best_and_the_last_validation_are_kept(tmp_path: Path) -> None:
    for step, score in ((10, 0.1), (20, 0.5), (30, 0.9), (40, 0.7), (50, 0.6)):
        save_pictures(tmp_path, [shown(score), shown(score, "a/b")], step, score)
        steps = sorted(set(read_pictures(tmp_path)["step"]))
        assert {path.name for path in tmp_path.glob("step-*")} == {f"step-{step:06d}" for step in steps}
    assert steps == [10, 30, 50]
    assert all(
        (tmp_path / row.file).read_bytes() == b"webp %f" % row.dsc for row in read_pictures(tmp_path).itertuples()
    )


def test_a_resumed_run_drops_the_pictures_of_steps_that_it_does_again(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_pictures(tmp_path, [shown(0.1)], step, step / 100)
    save_pictures(tmp_path, [shown(0.2)], 20, 0.05)
    assert list(read_pictures(tmp_path)[["step", "score"]].itertuples(index=False, name=None)) == [
        (10, 0.1),
        (20, 0.05),
    ]


def test_scores_that_are_not_known_do_not_hide_the_others(tmp_path: Path) -> None:
    for step, score in ((10, float("nan")), (20, 0.5), (30, 0.4)):
        save_pictures(tmp_path, [shown(0.1)], step, score)
    assert read_pictures(tmp_path)["step"].tolist() == [10, 20, 30]


def test_a_run_draws_each_modality_and_names_no_file_of_the_user(tiny_run: Path) -> None:
    rows = list(read_pictures(tiny_run / "pictures").itertuples())
    assert {row.step for row in rows} == {3, 6} and {row.modality for row in rows} == {"CT", "ENDOSCOPY"}
    assert len(rows) == 2 * 6 and len({(row.modality, row.structure) for row in rows}) == 6
    assert all(len(row.case) == 16 and int(row.case, 16) for row in rows), "salted hashes"
    for row in rows:
        with Image.open(tiny_run / "pictures" / row.file) as picture:
            drawn = np.asarray(picture).astype(int)
        assert min(np.abs(drawn - rgb(TRUTH)).max(-1).min(), np.abs(drawn - rgb(PREDICTIONS[0])).max(-1).min()) < 60
        assert 0 <= row.dsc <= 1


def test_loggers_that_take_pictures_get_them(tmp_path: Path) -> None:
    class Takes:
        given: list[Any]

        def log_pictures(self, pictures: Any, step: int) -> None:
            self.given = [step, *pictures]

    logger, callback = Takes(), Pictures(tmp_path, 6)
    callback.shown = [shown(0.4)]
    trainer: Any = SimpleNamespace(
        global_step=5, loggers=[object(), logger], callback_metrics={"val/dsc": torch.tensor(0.3)}
    )
    callback.on_validation_end(trainer, None)
    assert logger.given == [5, shown(0.4)]
    assert read_pictures(tmp_path / "pictures")["score"][0] == pytest.approx(0.3)
