from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medsam2.cases.case import Label
from medsam2.shards.prepare.segments import object_frames, reduce_frames, training_spans


@given(
    planes=hnp.arrays(np.uint16, (2, 4, 6, 7), elements=st.sampled_from([0, 0, 0, 1, 2, 300, 65535])),
    smallest=st.integers(1, 4),
)
@settings(max_examples=80, deadline=None)
def test_object_tables_equal_counting_by_hand(planes: np.ndarray, smallest: int):
    labels = tuple(Label(value, f"{plane}-{value}", plane) for plane in (0, 1) for value in (1, 300, 65535))
    objects = {(o.plane, o.value): o for o in object_frames(planes, labels, smallest)}
    for label in labels:
        mask = planes[label.plane] == label.id
        pixels = mask.sum(axis=(1, 2))
        assert ((label.plane, label.id) in objects) == (pixels.max() >= smallest)
        if (label.plane, label.id) not in objects:
            continue
        entry = objects[label.plane, label.id]
        assert entry.name == label.name
        assert entry.pixels.tolist() == pixels.tolist()
        for frame, (x0, y0, x1, y1) in enumerate(entry.boxes.tolist()):
            if pixels[frame] == 0:
                assert (x0, y0, x1, y1) == (0, 0, 0, 0)
                continue
            rows, columns = np.nonzero(mask[frame])
            assert (x0, y0, x1, y1) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


@given(labelled=hnp.arrays(np.bool_, st.integers(1, 300)), length=st.sampled_from([32, 64]), margin=st.integers(0, 8))
@settings(max_examples=150, deadline=None)
def test_training_segments_hold_every_labelled_frame_with_its_margin(labelled: np.ndarray, length: int, margin: int):
    spans = training_spans(labelled, length, margin)
    covered = np.zeros(labelled.size, int)
    for first, stop in spans:
        assert 0 < stop - first <= length
        assert labelled[first:stop].any()
        covered[first:stop] += 1
    assert covered.max(initial=0) <= 1
    near = np.zeros(labelled.size, bool)
    for frame in np.flatnonzero(labelled):
        near[max(0, frame - margin) : frame + margin + 1] = True
    assert np.array_equal(covered > 0, near)


def test_eight_absent_frames_are_kept_on_each_side():
    labelled = np.zeros(100, bool)
    labelled[40:50] = True
    assert training_spans(labelled, 64, 8) == [(32, 58)]


def test_long_runs_are_cut_in_equal_parts():
    assert training_spans(np.ones(130, bool), 64, 8) == [(0, 43), (43, 87), (87, 130)]


def test_frames_within_the_limit_are_not_touched():
    image, planes = np.zeros((2, 10, 20), np.uint8), np.zeros((1, 2, 10, 20), np.uint8)
    small, masks = reduce_frames(image, planes, 20)
    assert small is image
    assert masks is planes


@pytest.mark.parametrize("channels", [(), (3,)])
def test_larger_frames_are_reduced_by_area_and_masks_by_nearest(channels: tuple):
    image = np.zeros((1, 64, 128, *channels), np.uint8)
    image[:, ::2] = 200
    planes = np.zeros((1, 1, 64, 128), np.uint16)
    planes[..., 16:48, 32:96] = 700
    small, masks = reduce_frames(image, planes, 64)
    assert small.shape == (1, 32, 64, *channels)
    assert (small == 100).all()
    assert masks.shape == (1, 1, 32, 64)
    assert set(np.unique(masks)) == {0, 700}
    assert np.array_equal(masks[0, 0] > 0, (planes[0, 0] > 0)[1::2, 1::2])
