"""Overlay pictures: which slices are shown, and that the outlines stand where the masks are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsam2.evaluation.overlays import TRUTH, Drawn, PictureChoice, choose_slices, make_picture, pixel_edges, save
from medsam2.evaluation.predictor import FramePrompt
from medsam2.evaluation.quick import Row


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
    prompts = (FramePrompt(8, 0, box=(30, 20, 54, 39)), FramePrompt(9, 0, points=np.ones((1, 2)), labels=np.ones(1)))
    predictions = {"before": np.zeros_like(truth), "after": truth}
    scores = {"before": 0.0, "after": 1.0}
    drawn = Drawn(tmp_path / "picture.png", vars(_row()), scores)
    save(make_picture(frames, (5.0, 1.0, 1.0), truth, predictions, prompts, scores, _row()), drawn.path)
    assert drawn.name == "CT_organ_demo_01234567_0.png" and drawn.last == 1.0
    pixels = np.asarray(Image.open(drawn.path).convert("RGB")).astype(int)
    green = np.array([int(TRUTH[i : i + 2], 16) for i in (1, 3, 5)])
    close = (np.abs(pixels - green).max(-1) < 40).sum()
    assert close > 500


def _offer(choice: PictureChoice, rows: list[Row], drawn: list[Drawn]) -> None:
    """What a rank does with its cases."""
    for row in rows:
        if choice.offered(row, row.dsc):
            drawn.append(Drawn(Path(f"{row.case}.png"), vars(row), {"nano": row.dsc}))


def test_the_first_of_each_group_and_the_worst_are_drawn_however_ranks_share_the_cases() -> None:
    scores = np.random.default_rng(3).permutation(60) / 60
    rows = [_row("organ" if i % 3 else "lesion", f"{i:03d}", float(dsc)) for i, dsc in enumerate(scores)]
    drawn: list[Drawn] = []
    for rank in range(3):
        _offer(PictureChoice(2, 4), rows[rank::3], drawn)
    drawn.sort(key=lambda one: one.row["case"])
    assert len(drawn) < len(rows)
    first, worst = PictureChoice(2, 4).chosen(drawn)
    assert [one.row["case"] for one in first] == ["000", "001", "002", "003"]
    assert [one.row["case"] for one in worst] == [f"{i:03d}" for i in np.argsort(scores)[:4]]


def test_of_equal_scores_no_more_than_asked_for_are_drawn() -> None:
    drawn: list[Drawn] = []
    _offer(PictureChoice(0, 2), [_row(case=name, dsc=0.0) for name in "abcd"], drawn)
    assert [one.row["case"] for one in drawn] == ["a", "b"]
    assert [one.row["case"] for one in PictureChoice(0, 2).chosen(drawn)[1]] == ["a", "b"]


def test_nothing_is_drawn_where_no_pictures_are_asked_for() -> None:
    choice = PictureChoice(0, 0)
    assert not choice.offered(_row(), 0.0) and choice.chosen([]) == ([], [])


def test_each_protocol_has_pictures_of_its_own() -> None:
    drawn: list[Drawn] = []
    choice = PictureChoice(1, 1)
    _offer(choice, [_row(case="a", dsc=0.9), replace(_row(case="a", dsc=0.1), protocol="other")], drawn)
    first, worst = choice.chosen(drawn)
    assert [one.row["protocol"] for one in first] == ["largest_box_both", "other"] == [o.row["protocol"] for o in worst]


def test_the_outline_follows_the_sides_of_the_pixels_and_closes() -> None:
    mask = np.zeros((5, 6), bool)
    mask[1:3, 2:5] = True
    mask[4, 0] = True  # at the border
    edges = pixel_edges(mask)
    assert len(edges) == 2 * (2 + 3) + 4, "perimeters in pixels"
    ends = Counter(map(tuple, edges.reshape(-1, 2).tolist()))
    assert all(count % 2 == 0 for count in ends.values())
    assert edges[:, :, 0].min() == -0.5 and edges[:, :, 1].max() == 4.5
    assert not len(pixel_edges(np.zeros((3, 3), bool)))
