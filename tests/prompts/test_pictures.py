"""The picture of the prompts shows every kind, and what it shows is what training gets."""

from __future__ import annotations

import io

import torch
from PIL import Image

from medsam2.prompts.initial import initial_kinds
from medsam2.prompts.pictures import SETTINGS, example_objects, panels, prompt_sheet
from medsam2.prompts.simulate import initial_prompts


def test_every_kind_has_a_panel_with_its_own_prompts() -> None:
    masks = example_objects()
    shown = {panel.name: panel for panel in panels(masks, 5)}
    assert set(initial_kinds()) < set(shown) and "corrections of a guess" in shown
    for kind in ("click", "box", "scribble"):
        expected = initial_prompts(masks, kind, torch.tensor([5, 6]), 0, SETTINGS)
        found = shown[kind].prompts
        assert found is not None and found.points is not None and expected.points is not None
        assert torch.equal(found.points, expected.points)


def test_the_objects_of_the_example_touch_but_do_not_overlap() -> None:
    first, second = example_objects()
    assert not (first & second).any()
    assert (torch.nn.functional.max_pool2d(first[None].float(), 5, 1, 2)[0].bool() & second).any()


def test_the_sheet_is_a_picture_of_two_rows() -> None:
    picture = Image.open(io.BytesIO(prompt_sheet()))
    assert picture.format == "PNG" and picture.width > 1000 and picture.height > 500
    colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or []}
    assert {(56, 189, 248), (248, 113, 113)} <= colours
