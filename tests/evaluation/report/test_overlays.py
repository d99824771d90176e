"""Overlay pictures: which objects get one, and what is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medsam2.cases.case import Label
from medsam2.evaluation.loaded_case import LoadedCase
from medsam2.evaluation.report.overlays import DrawnPicture, PictureSelection, draw_picture, object_frames
from medsam2.evaluation.run.score_case import ObjectPrediction, Row
from medsam2.inference.predictor import FramePrompt
from medsam2.reporting.style import PREDICTIONS, PROMPT, TRUTH, rgb


def _row(structure: str = "organ", case: str = "0123456789abcdef", dsc: float = 0.5) -> Row:
    return Row(
        checkpoint="nano", protocol="largest_box_both", dataset="demo", modality="CT", kind="volume", case=case,
        patient="p", structure=structure, object=0, frames=20, scored_frames=20, prompt_frames="8",
        seconds=0.1, peak_mb=1.0, dsc=dsc,
        iou=0.4, volume_error=0.0, present_dsc=0.5, present_iou=0.4, prompt_dsc=0.6, other_dsc=0.4,
        absent_empty_share=1.0, absent_all_empty=True, voxels=10, voxels_predicted=10, voxels_both=5,
    )  # fmt: skip


def _truth() -> np.ndarray:
    truth = np.zeros((20, 60, 80), bool)
    truth[4:13, 20:40, 30:55] = True
    return truth


@pytest.mark.parametrize("colour", [False, True])
def test_a_picture_is_drawn_with_the_outline_of_the_truth(tmp_path: Path, colour: bool) -> None:
    truth = _truth()
    frames = np.full((20, 3 if colour else 1, 60, 80), 30, np.uint8)
    prompts = (FramePrompt(8, 0, box=(30, 20, 54, 39)), FramePrompt(9, 0, points=np.ones((1, 2)), labels=np.ones(1)))
    organ = (Label(1, "organ"),)
    case = LoadedCase(torch.from_numpy(frames), truth[None], organ, (5.0, 1.0, 1.0), "volume", "CT", "demo", "c", "p")
    predictions = [
        ObjectPrediction(replace(_row(), checkpoint=label, dsc=dsc), truth, mask, prompts)
        for label, dsc, mask in (("before", 0.0, np.zeros_like(truth)), ("after", 1.0, truth))
    ]
    drawn = draw_picture(case, predictions, tmp_path / "picture.png")
    assert drawn.file_name == "CT_organ_demo_01234567_0.png" and drawn.last_dsc == 1.0
    pixels = np.asarray(Image.open(tmp_path / drawn.file).convert("RGB")).astype(int)
    for colour_name in (TRUTH, PREDICTIONS[1], PROMPT):
        assert (np.abs(pixels - rgb(colour_name)).max(-1) < 40).sum() > 300, colour_name


def test_a_photograph_has_no_slices_and_a_mask_prompt_is_drawn() -> None:
    truth = _truth()[8:9]
    prompts = (FramePrompt(0, 0, mask=truth[0]),)
    crop = (slice(10, 50), slice(20, 70))
    (frame,) = object_frames(np.zeros((1, 3, 60, 80), np.uint8), truth, truth, prompts, (0,), crop, PREDICTIONS[0])
    assert frame.title == "prompt" and frame.note == "1.00" and frame.image.shape == (40, 50, 3)
    assert [outline.dashed for outline in frame.outlines] == [False, False, True]
    assert (frame.outlines[2].mask == truth[0][crop]).all()


def _offer(choice: PictureSelection, rows: list[Row], drawn: list[DrawnPicture]) -> None:
    """What a rank does with its cases."""
    for row in rows:
        if choice.may_select(row, row.dsc):
            drawn.append(DrawnPicture(Path(f"{row.case}.png"), vars(row), {"nano": row.dsc}))


def test_the_first_of_each_group_and_the_worst_are_drawn_however_ranks_share_the_cases() -> None:
    scores = np.random.default_rng(3).permutation(60) / 60
    rows = [_row("organ" if i % 3 else "lesion", f"{i:03d}", float(dsc)) for i, dsc in enumerate(scores)]
    drawn: list[DrawnPicture] = []
    for rank in range(3):
        _offer(PictureSelection(2, 4), rows[rank::3], drawn)
    drawn.sort(key=lambda one: one.row["case"])
    assert len(drawn) < len(rows)
    first, worst = PictureSelection(2, 4).select(drawn)
    assert [one.row["case"] for one in first] == ["000", "001", "002", "003"]
    assert [one.row["case"] for one in worst] == [f"{i:03d}" for i in np.argsort(scores)[:4]]


def test_of_equal_scores_no_more_than_asked_for_are_drawn() -> None:
    drawn: list[DrawnPicture] = []
    _offer(PictureSelection(0, 2), [_row(case=name, dsc=0.0) for name in "abcd"], drawn)
    assert [one.row["case"] for one in drawn] == ["a", "b"]
    assert [one.row["case"] for one in PictureSelection(0, 2).select(drawn)[1]] == ["a", "b"]


def test_nothing_is_drawn_where_no_pictures_are_asked_for() -> None:
    choice = PictureSelection(0, 0)
    assert not choice.may_select(_row(), 0.0) and choice.select([]) == ([], [])


def test_each_protocol_has_pictures_of_its_own() -> None:
    drawn: list[DrawnPicture] = []
    choice = PictureSelection(1, 1)
    _offer(choice, [_row(case="a", dsc=0.9), replace(_row(case="a", dsc=0.1), protocol="other")], drawn)
    first, worst = choice.select(drawn)
    assert [one.row["protocol"] for one in first] == ["largest_box_both", "other"] == [o.row["protocol"] for o in worst]
