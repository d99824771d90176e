from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsam2.data.plan.randomness import CounterGenerator
from medsam2.data.plan.stream import choose_objects, choose_window, largest_window, reflect
from medsam2.data.settings import DataSettings


def settings(**changes: object) -> DataSettings:
    return DataSettings.model_validate({"shards": "unused", "min_pixels": 4, **changes})


PRESENCE = st.lists(st.sampled_from([0, 2, 4, 90]), min_size=1, max_size=40).filter(lambda p: max(p) >= 4)


@given(PRESENCE, st.integers(1, 12), st.integers(1, 3), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 10**9))
def test_the_first_frame_holds_the_object_and_frames_are_evenly_spaced(
    presence: list[int], count: int, stride: int, reverse: float, seed: int
) -> None:
    pixels = np.array(presence)
    data_settings = settings(clip_frames=count, stride_max=stride, reverse_probability=reverse)
    frames = choose_window(pixels, data_settings, CounterGenerator(seed))
    assert frames.shape == (count,)
    assert frames.min() >= 0 and frames.max() < len(pixels)
    assert pixels[frames[0]] >= 4
    steps = np.abs(np.diff(frames))
    if len(pixels) > 2 and count > 1:
        assert steps.max() <= max(stride, 1)


@given(PRESENCE, st.integers(0, 10**9))
def test_a_clip_that_fits_shows_no_frame_twice(presence: list[int], seed: int) -> None:
    pixels = np.array(presence)
    count = min(4, (len(pixels) + 1) // 2)
    frames = choose_window(pixels, settings(clip_frames=count, stride_max=2), CounterGenerator(seed))
    assert len(set(frames.tolist())) == count


@given(PRESENCE, st.integers(1, 9), st.data(), st.integers(0, 10**9))
def test_the_prompted_frame_may_stand_anywhere_in_the_clip(
    presence: list[int], count: int, data: st.DataObject, seed: int
) -> None:
    pixels = np.array(presence)
    place = data.draw(st.integers(0, count - 1))
    frames = choose_window(pixels, settings(clip_frames=count), CounterGenerator(seed), place)
    assert frames.min() >= 0 and frames.max() < len(pixels)
    assert pixels[frames[place]] >= 4


def test_short_segments_are_reflected_in_time() -> None:
    assert reflect(np.arange(7), 3).tolist() == [0, 1, 2, 1, 0, 1, 2]
    assert reflect(np.arange(-3, 3), 1).tolist() == [0] * 6
    pixels = np.array([50, 50, 50])
    frames = choose_window(pixels, settings(clip_frames=6, reverse_probability=0.0), CounterGenerator(1))
    assert frames.tolist() in ([0, 1, 2, 1, 0, 1], [1, 2, 1, 0, 1, 2], [2, 1, 0, 1, 2, 1])


def test_time_runs_backwards_as_often_as_asked() -> None:
    pixels = np.full(40, 50)
    data_settings = settings(clip_frames=4, reverse_probability=0.3)
    backward = [np.diff(choose_window(pixels, data_settings, CounterGenerator(seed)))[0] < 0 for seed in range(1000)]
    assert abs(np.mean(backward) - 0.3) < 0.05


@pytest.mark.parametrize(("probability", "least", "most"), [(0.0, 0.0, 0.35), (1.0, 1.0, 1.0)])
def test_absence_is_shown_as_often_as_asked(probability: float, least: float, most: float) -> None:
    pixels = np.array([0] * 10 + [50] * 20 + [0] * 10)
    data_settings = settings(clip_frames=4, stride_max=1, absence_probability=probability)
    absent = [(pixels[choose_window(pixels, data_settings, CounterGenerator(seed))] == 0).any() for seed in range(300)]
    assert least <= np.mean(absent) <= most


def test_rare_objects_are_drawn_more_often_and_others_join_them() -> None:
    pixels = np.full((3, 10), 50)
    pixels[2] = 0
    data_settings = settings(clip_frames=3, max_objects=2)
    drawn = [
        choose_objects(pixels, np.array([1.0, 4.0, 9.0]), data_settings, CounterGenerator(seed))[0]
        for seed in range(500)
    ]
    assert {len(objects) for objects in drawn} == {2}
    assert abs(np.mean([objects[0] == 1 for objects in drawn]) - 0.8) < 0.06
    assert all(2 not in objects for objects in drawn)


def test_objects_that_are_absent_on_the_prompted_frame_do_not_join() -> None:
    pixels = np.array([[50] * 10, [0] * 9 + [50]])
    data_settings = settings(clip_frames=3, max_objects=2)
    for seed in range(50):
        objects, frames = choose_objects(pixels, np.array([1.0, 1.0]), data_settings, CounterGenerator(seed))
        assert all(pixels[index, frames[0]] >= 4 for index in objects)


def test_the_validation_window_starts_at_the_largest_frame() -> None:
    pixels = np.array([0, 3, 9, 5, 2, 0, 0, 0])
    assert largest_window(pixels, 4).tolist() == [2, 3, 4, 5]
    assert largest_window(pixels[::-1], 4).tolist() == [5, 4, 3, 2]
