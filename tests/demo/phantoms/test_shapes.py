"""Outlines are what they say, and painting them gives the areas that geometry asks for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsam2.demo.phantoms.scene import Scene, Structure
from medsam2.demo.phantoms.shapes import fill, place, rise_and_fall, smooth_noise, star, strip, turn, visits


@given(middle=st.floats(3, 16), half=st.floats(1, 8), bluntness=st.floats(1.5, 6))
def test_a_body_cut_by_slices_is_largest_in_its_middle_and_gone_beyond_its_ends(middle, half, bluntness):
    size = rise_and_fall(20, middle, half, bluntness)
    assert (size >= 0).all() and (size <= 1).all()
    assert (size[np.abs(np.arange(20) - middle) >= half] == 0).all()
    assert abs(size.argmax() - middle) <= 1


def test_a_structure_that_comes_back_is_absent_in_between():
    size = visits(20, [(-9.0, 6.0), (12.0, 29.0)], 2.0)
    assert size[0] == 1 and size[19] == 1
    assert (size[6:13] == 0).all()


@pytest.mark.parametrize("radius", [8.0, 15.5, 30.0])
def test_a_round_outline_paints_the_area_of_a_circle(radius):
    unit = star(np.random.default_rng(0), 1, 0.0, 1.0)
    canvas = np.zeros((96, 96), np.uint8)
    fill(canvas, place(unit, np.array([[48.0, 48.0]]), np.array([radius]))[0], 7)
    # fillPoly also paints the pixels under the border line
    assert np.pi * (radius - 0.6) ** 2 < (canvas == 7).sum() < np.pi * (radius + 0.8) ** 2


def test_an_outline_of_almost_no_radius_is_an_absent_frame():
    unit = star(np.random.default_rng(0), 3, 0.1, 1.0)
    outlines = place(unit, np.zeros((3, 2)), np.array([0.0, 10.0, 1.0]))
    assert [len(polygons) for polygons in outlines] == [0, 1, 0]


def test_turning_keeps_lengths():
    unit = star(np.random.default_rng(1), 4, 0.2, 1.5)
    turned = turn(unit, np.array([0.0, 0.5, 1.0, 2.0]))
    assert np.allclose(np.linalg.norm(unit, axis=-1), np.linalg.norm(turned, axis=-1))
    assert np.allclose(unit[0], turned[0])


def test_a_strip_has_the_width_that_was_asked_for():
    line = np.stack([np.linspace(10, 80, 20), np.full(20, 40.0)], 1)
    canvas = np.zeros((96, 96), np.uint8)
    fill(canvas, [strip(line, 5.0)], 1)
    assert 10 <= canvas[:, 45].sum() <= 12


def test_later_structures_cover_earlier_ones_and_labels_follow():
    box = np.array([[2, 2], [20, 2], [20, 20], [2, 20]], np.float32)
    small = np.array([[8, 8], [12, 8], [12, 12], [8, 12]], np.float32)
    scene = Scene((1, 32, 32))
    scene.add(Structure("lesion", [[small]], "lesion", 1))
    scene.add(Structure("organ", [[box]], "organ"))
    scene.add(Structure("clutter", [[box + 1]], None))
    scene.sort()
    assert [structure.kind for structure in scene.structures] == ["clutter", "organ", "lesion"]
    assert scene.structures[2].host == 1
    labels = scene.labels(scene.regions(), {"organ": 1, "lesion": 2})
    assert labels[0, 10, 10] == 2 and labels[0, 4, 4] == 1 and labels[0, 21, 21] == 0


@given(seed=st.integers(0, 50), cells=st.integers(2, 12))
def test_smooth_noise_has_the_shape_asked_for_and_is_finite(seed, cells):
    noise = smooth_noise(np.random.default_rng(seed), (5, 24, 30), (3, cells))
    assert noise.shape == (5, 24, 30) and noise.dtype == np.float32 and np.isfinite(noise).all()
