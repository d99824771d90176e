"""Which slice is prompted, and where the box and the points stand on it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsam2.prompts.evaluation import (
    ObjectTrack,
    component_points,
    components_by_size,
    deepest_point,
    mark_entries,
    pick_frames,
    tight_box,
)


def _track(areas: list[int]) -> ObjectTrack:
    sizes = np.asarray(areas)
    return ObjectTrack(sizes, lambda: mark_entries(sizes > 0))


@pytest.mark.parametrize(
    ("rule", "frames"),
    [("first", (1,)), ("last", (7,)), ("middle", (4,)), ("largest", (3,)), ("spread", (2, 3, 4))],
)
def test_slice_rules_choose_among_the_frames_that_show_the_object(rule: str, frames: tuple[int, ...]) -> None:
    assert pick_frames(_track([0, 2, 5, 9, 9, 3, 0, 1]), rule) == frames


def test_spread_takes_three_frames_evenly_and_drops_the_first() -> None:
    assert pick_frames(_track([1] * 16), "spread") == (4, 8, 12)


def test_spread_takes_all_frames_of_a_short_object() -> None:
    assert pick_frames(_track([0, 1, 1, 0]), "spread") == (1, 2)


def test_an_object_that_is_nowhere_cannot_be_prompted() -> None:
    with pytest.raises(ValueError, match="nothing to prompt"):
        pick_frames(_track([0, 0]), "largest")


def test_a_box_runs_through_the_centres_of_the_outermost_pixels() -> None:
    mask = np.zeros((20, 30), bool)
    mask[4:9, 11:15] = True
    assert tight_box(mask) == (11.0, 4.0, 14.0, 8.0)


def test_a_rectangle_is_clicked_in_its_middle() -> None:
    mask = np.zeros((20, 40), bool)
    mask[5:12, 3:34] = True
    assert deepest_point(mask) == (18.0, 8.0)


def test_the_border_of_the_picture_counts_as_outside() -> None:
    assert deepest_point(np.ones((9, 9), bool)) == (4.0, 4.0)


def test_a_ring_is_clicked_on_the_ring_not_in_its_hole() -> None:
    y, x = np.mgrid[:41, :41]
    radius = np.hypot(x - 20, y - 20)
    ring = (radius > 8) & (radius < 15)
    px, py = deepest_point(ring)
    assert ring[int(py), int(px)]
    assert 10 < np.hypot(px - 20, py - 20) < 13


def test_the_largest_component_is_clicked_first_and_diagonal_neighbours_are_one_component() -> None:
    mask = np.zeros((30, 30), bool)
    mask[2:5, 2:5] = True
    mask[10:20, 10:20] = True
    mask[25, 25] = mask[26, 26] = True
    assert [int(part.sum()) for part in components_by_size(mask)] == [100, 9, 2]
    points = component_points(mask, 3)
    assert points.shape == (3, 2) and points.dtype == np.float32
    assert mask[points[:, 1].astype(int), points[:, 0].astype(int)].all()
    assert 10 <= component_points(mask)[0, 0] < 20


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.02, 0.9))
def test_clicks_are_on_the_object_and_inside_its_box_whatever_its_shape(seed: int, density: float) -> None:
    mask = np.random.default_rng(seed).random((17, 23)) < density
    if not mask.any():
        return
    x0, y0, x1, y1 = tight_box(mask)
    for x, y in component_points(mask, 3):
        assert mask[int(y), int(x)] and x0 <= x <= x1 and y0 <= y <= y1
