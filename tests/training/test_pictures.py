"""Overlays of fixed validation clips: which, what they show, and what stays on disk."""

from __future__ import annotations

import io
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medsam2.evaluation.overlays import PREDICTIONS, TRUTH
from medsam2.evaluation.predictor import FramePrompt
from medsam2.training.pictures import (
    SIDE,
    Candidate,
    Pictures,
    Shown,
    choose,
    crop,
    panel_size,
    prune,
    read_pictures,
    rgb,
    strip,
    write_pictures,
)

FOUND = [
    Candidate(False, "CT", "liver", "a", "c1", 0),
    Candidate(False, "CT", "liver", "a", "c2", 0),
    Candidate(False, "CT", "lesion", "a", "c1", 1),
    Candidate(False, "CT", "kidney", "a", "c1", 2),
    Candidate(False, "MR", "heart", "b", "c3", 0),
    Candidate(True, "US", "valve", "g", "c4", 0),
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


def scene(frames: int = 5) -> tuple[torch.Tensor, np.ndarray, FramePrompt]:
    truth = np.zeros((frames, 64, 96), bool)
    truth[:, 20:40, 30:60] = True
    image = torch.full((frames, 1, 64, 96), 90, dtype=torch.uint8)
    return image, truth, FramePrompt(2, 0, box=(30.0, 20.0, 59.0, 39.0))


def pixels(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def near(image: np.ndarray, colour: str) -> np.ndarray:
    """bool [H, W]: pixels of about this hue; thin lines lose some colour in WebP."""
    wanted = np.array(rgb(colour)) - np.array(rgb(colour)).mean()
    centred = image - image.mean(-1, keepdims=True)
    size = np.linalg.norm(centred, axis=-1)
    return np.asarray((size > 25) & (centred @ wanted > 0.9 * size * np.linalg.norm(wanted)))


def test_a_strip_shows_five_frames_with_both_outlines_where_they_are() -> None:
    image, truth, prompt = scene(9)
    wrong = np.zeros_like(truth)
    wrong[:, 24:36, 34:50] = True
    drawn = pixels(strip(image, truth, wrong, prompt, 1.0))
    assert drawn.shape == (SIDE, 5 * SIDE + 4 * 4, 3)
    rows, columns = crop(truth)
    scale = SIDE / (columns.stop - columns.start)
    panel = drawn[:, :SIDE]  # a frame without a prompt
    for colour, mask in ((TRUTH, truth[0]), (PREDICTIONS[0], wrong[0])):
        y, x = np.nonzero(near(panel, colour))
        ys, xs = np.nonzero(mask)
        wanted = [
            ys.min() - rows.start,
            ys.max() + 1 - rows.start,
            xs.min() - columns.start,
            xs.max() + 1 - columns.start,
        ]
        assert np.array([y.min(), y.max(), x.min(), x.max()]) / scale == pytest.approx(np.array(wanted), abs=1.0)


def test_a_perfect_prediction_covers_the_truth_and_an_absent_one_shows_it_alone() -> None:
    image, truth, prompt = scene()
    perfect = pixels(strip(image, truth, truth, prompt, 1.0))
    nothing = pixels(strip(image, truth, np.zeros_like(truth), prompt, 1.0))
    assert near(perfect, PREDICTIONS[0]).sum() > 300 > near(nothing, PREDICTIONS[0]).sum()
    assert near(nothing, TRUTH).sum() > 300


def test_a_still_is_one_panel_and_thick_slices_are_drawn_in_proportion() -> None:
    image, truth, _ = scene(1)
    assert pixels(strip(image, truth, truth, FramePrompt(0, 0, box=(30, 20, 59, 39)), 1.0)).shape[1] == SIDE
    assert panel_size(40, 40, 2.0) == (SIDE, SIDE // 2) and panel_size(40, 40, 0.5) == (SIDE // 2, SIDE)


def test_the_crop_holds_the_object_and_stays_inside_even_at_a_border() -> None:
    truth = np.zeros((2, 50, 40), bool)
    truth[0, 45:50, 0:4] = truth[1, 48:50, 0:10] = True
    rows, columns = crop(truth)
    assert truth[:, rows, columns].sum() == truth.sum()
    assert 0 <= rows.start < rows.stop <= 50 and 0 <= columns.start < columns.stop <= 40


# ---------------------------------------------------------------------------------------------------- on disk


def shown(dsc: float, structure: str = "liver") -> Shown:
    return Shown("CT", structure, "0a1b2c3d4e5f", 0, dsc, 9, b"webp %f" % dsc)


def test_the_first_the_best_and_the_last_validation_are_kept(tmp_path: Path) -> None:
    for step, score in ((10, 0.1), (20, 0.5), (30, 0.9), (40, 0.7), (50, 0.6)):
        prune(tmp_path, write_pictures(tmp_path, [shown(score), shown(score, "a/b")], step, score))
        steps = sorted({row.step for row in read_pictures(tmp_path)})
        assert {path.name for path in tmp_path.glob("step-*")} == {f"step-{step:06d}" for step in steps}
    assert steps == [10, 30, 50]
    assert all((tmp_path / row.file).read_bytes() == b"webp %f" % row.dsc for row in read_pictures(tmp_path))


def test_a_resumed_run_drops_the_pictures_of_steps_that_it_does_again(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        prune(tmp_path, write_pictures(tmp_path, [shown(0.1)], step, step / 100))
    prune(tmp_path, write_pictures(tmp_path, [shown(0.2)], 20, 0.05, resumed_step=15))
    assert [(row.step, row.score) for row in read_pictures(tmp_path)] == [(10, 0.1), (20, 0.05)]


def test_scores_that_are_not_known_do_not_hide_the_others(tmp_path: Path) -> None:
    for step, score in ((10, float("nan")), (20, 0.5), (30, 0.4)):
        prune(tmp_path, write_pictures(tmp_path, [shown(0.1)], step, score))
    assert [row.step for row in read_pictures(tmp_path)] == [10, 20, 30]


def test_a_run_draws_each_modality_and_names_no_file_of_the_user(tiny_run: Path) -> None:
    rows = read_pictures(tiny_run / "pictures")
    assert {row.step for row in rows} == {3, 6} and {row.modality for row in rows} == {"CT", "ENDOSCOPY"}
    assert len(rows) == 2 * 6 and len({(row.modality, row.structure) for row in rows}) == 6
    assert all(len(row.case) == 16 and int(row.case, 16) for row in rows), "salted hashes"
    for row in rows:
        assert pixels((tiny_run / "pictures" / row.file).read_bytes()).max() > 60, row
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
    assert read_pictures(tmp_path / "pictures")[0].score == pytest.approx(0.3)
