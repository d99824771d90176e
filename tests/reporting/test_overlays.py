"""Outlines stand where the masks are, sheets cut nothing off, and the frames that are shown hold the prompt."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from medsam2.reporting.overlays import (
    MIN_SHEET_WIDTH,
    Frame,
    Outline,
    Strip,
    box_outline,
    choose_frames,
    crop_around,
    draw_frame,
    draw_sheet,
    encode,
)
from medsam2.reporting.style import PREDICTIONS, PROMPT, TRUTH, rgb


def near(image: Image.Image, colour: str) -> np.ndarray:
    """bool [H, W]: pixels of about this colour."""
    return np.asarray(np.abs(np.asarray(image).astype(int) - rgb(colour)).max(-1) < 30)


def rectangle(shape: tuple[int, ...] = (64, 96)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[..., 20:40, 30:60] = True
    return mask


@pytest.mark.parametrize("factor", [0.5, 1, 4])
def test_an_outline_stands_where_its_mask_is(factor: float) -> None:
    image = np.full((64, 96), 90, np.uint8)
    drawn = draw_frame(Frame(image, (Outline(rectangle(), TRUTH),)), int(96 * factor))
    y, x = np.nonzero(near(drawn, TRUTH))
    assert np.array([y.min(), y.max() + 1, x.min(), x.max() + 1]) / factor == pytest.approx([20, 40, 30, 60], abs=2)
    assert not near(drawn, TRUTH)[int(30 * factor), int(45 * factor)], "an outline is not filled"


def test_thick_slices_are_drawn_in_proportion_and_thin_structures_survive_a_reduction() -> None:
    image = np.full((1024, 1024), 90, np.uint8)
    thin = np.zeros((1024, 1024), bool)
    thin[500:502] = True
    assert near(draw_frame(Frame(image, (Outline(thin, TRUTH),))), TRUTH).any(0).all()
    assert draw_frame(Frame(image[:40, :40]), 100, 2.0).size == (50, 100)
    assert draw_frame(Frame(image[:40, :40]), 100, 0.5).size == (100, 50)


def test_boxes_are_dashed_and_points_are_drawn() -> None:
    image = np.full((64, 96, 3), 90, np.uint8)
    boxed = near(draw_frame(Frame(image, (box_outline((64, 96), (30, 20, 59, 39)),)), 96), PROMPT)
    solid = near(draw_frame(Frame(image, (Outline(rectangle(), PROMPT),)), 96), PROMPT)
    assert 0.3 < boxed.sum() / solid.sum() < 0.7 and not (boxed & ~solid).any()
    for positive in (True, False):
        assert near(draw_frame(Frame(image, points=((40.0, 30.0, positive),)), 96), PROMPT).sum() > 20


def test_a_sheet_has_room_for_title_and_legend_beside_one_narrow_frame() -> None:
    frame = Frame(np.full((60, 20), 90, np.uint8), title="frame 0", note="0.83")
    bare = draw_sheet([Strip((frame,))])
    legend = [(f"a long name of checkpoint {number}", colour) for number, colour in enumerate(PREDICTIONS)]
    sheet = draw_sheet([Strip((frame,), "nano", "0.912", "DSC")], "a long title " * 9, "CT", legend)
    assert bare.width < MIN_SHEET_WIDTH <= sheet.width
    assert sheet.height > bare.height + 4 * 18 and near(sheet, PREDICTIONS[-1]).any()
    with Image.open(io.BytesIO(encode(sheet, "PNG"))) as picture:
        assert picture.size == sheet.size


def test_frames_hold_the_prompt_and_one_beyond_each_end() -> None:
    truth = np.zeros((20, 60, 80), bool)
    truth[4:13, 20:40, 30:55] = True
    assert choose_frames(truth, (8,)) == (3, 6, 8, 10, 13)
    assert choose_frames(truth, (4, 8, 12)) == (3, 4, 8, 12, 13)
    assert choose_frames(truth, tuple(range(4, 12))) == (4, 5, 6, 7, 8)
    assert choose_frames(truth[8:9], (0,)) == (0,) and choose_frames(truth[10:13], (1,)) == (0, 1, 2)


def test_the_crop_holds_the_object_and_stays_inside_even_at_a_border() -> None:
    mask = np.zeros((50, 40), bool)
    mask[45:50, 0:4] = mask[48:50, 0:10] = True
    rows, columns = crop_around(mask)
    assert mask[rows, columns].sum() == mask.sum()
    assert 0 <= rows.start < rows.stop <= 50 and 0 <= columns.start < columns.stop <= 40
