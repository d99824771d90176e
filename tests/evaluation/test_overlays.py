"""Overlay pictures: which slices are shown, and that the outlines stand where the masks are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsam2.evaluation.overlays import TRUTH, OverlayPlan, choose_slices, make_picture
from medsam2.evaluation.predictor import FramePrompt
from medsam2.evaluation.quick import Row


def _row(structure: str = "organ", case: str = "0123456789abcdef") -> Row:
    return Row(
        "nano", "largest_box_both", "demo", "CT", "volume", case, "p", structure, 0, 20, "8", 10,
        0.5, 0.4, 0.3, 0.6, 0.4, 1.0, True, 0.1,
    )  # fmt: skip


def _truth() -> np.ndarray:
    truth = np.zeros((20, 60, 80), bool)
    truth[4:13, 20:40, 30:55] = True
    return truth


def test_slices_hold_the_prompt_and_one_beyond_each_end() -> None:
    chosen = choose_slices(_truth(), (8,))
    assert len(chosen) == 5 and 8 in chosen and chosen[0] == 3 and chosen[-1] == 13
    assert list(chosen) == sorted(chosen)


def test_slices_are_spread_evenly_where_the_prompt_is_not_in_the_middle() -> None:
    truth = np.zeros((20, 4, 4), bool)
    truth[5:12, 1, 1] = True
    assert choose_slices(truth, (9,)) == (4, 6, 7, 9, 12)
    assert choose_slices(truth, (4, 8, 12)) == (4, 6, 8, 10, 12)


def test_a_still_has_one_slice_and_a_short_clip_all_of_them() -> None:
    assert choose_slices(_truth()[8:9], (0,)) == (0,)
    assert choose_slices(_truth()[10:13], (1,)) == (0, 1, 2)


@pytest.mark.parametrize("colour", [False, True])
def test_a_picture_is_drawn_with_the_outline_of_the_truth(tmp_path: Path, colour: bool) -> None:
    truth = _truth()
    frames = np.full((20, 3 if colour else 1, 60, 80), 30, np.uint8)
    plan = OverlayPlan(1)
    prompts = (FramePrompt(8, 0, box=(30, 20, 54, 39)), FramePrompt(9, 0, points=np.ones((1, 2)), labels=np.ones(1)))
    predictions = {"before": np.zeros_like(truth), "after": truth}
    scores = {"before": 0.0, "after": 1.0}

    def make():  # type: ignore[no-untyped-def]
        return make_picture(frames, (5.0, 1.0, 1.0), truth, predictions, prompts, scores, _row())

    plan.offer(make, _row())
    plan.offer(lambda: pytest.fail("the group has its picture"), _row(case="fedcba9876543210"))
    (drawn,) = plan.draw(tmp_path / "overlays")
    assert drawn.path.name == "CT_organ_demo_01234567_0.png"
    pixels = np.asarray(Image.open(drawn.path).convert("RGB")).astype(int)
    green = np.array([int(TRUTH[i : i + 2], 16) for i in (1, 3, 5)])
    close = (np.abs(pixels - green).max(-1) < 40).sum()
    assert close > 500


def test_nothing_is_kept_or_written_where_no_pictures_are_asked_for(tmp_path: Path) -> None:
    plan = OverlayPlan(0)
    plan.offer(lambda: pytest.fail("not wanted"), _row())
    assert plan.draw(tmp_path / "overlays") == []
    assert not (tmp_path / "overlays").exists()
