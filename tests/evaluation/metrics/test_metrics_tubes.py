"""Centre lines keep what they must keep; clDice and instance F1 of cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medsam2.evaluation.metrics.metrics import centre_line_dice, instance_f1


def test_cldice_does_not_mind_the_calibre_but_a_missing_branch() -> None:
    truth = np.zeros((1, 60, 60), bool)
    truth[0, 28:33, 5:55] = True  # a trunk of 50
    thick = truth.copy()
    thick[0, 26:35, 5:55] = True
    branched = truth.copy()
    branched[0, 5:28, 29:32] = True
    assert centre_line_dice(thick, truth, volume=True) > 0.99
    missed = centre_line_dice(truth, branched, volume=True)
    assert missed == pytest.approx(2 * 0.68 / 1.68, abs=0.03)  # about 47 of 69 pixels of the centre line are covered


def test_cldice_in_a_plane_is_the_same_as_a_slice_and_as_a_frame() -> None:
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(50, 50)), 2)
    truth, prediction = noise > 0.1, np.roll(noise > 0.12, 1, 0)
    as_frame = centre_line_dice(prediction[None], truth[None], volume=False)
    assert 0.5 < as_frame < 1
    assert centre_line_dice(prediction[None], truth[None], volume=True) == pytest.approx(as_frame, abs=0.02)


def test_cldice_of_a_clip_is_the_mean_over_frames_that_show_something() -> None:
    truth = np.zeros((3, 20, 20), bool)
    truth[0, 8:11, 2:18] = truth[1, 8:11, 2:18] = True
    prediction = truth.copy()
    prediction[1] = False
    assert centre_line_dice(prediction, truth, volume=False) == pytest.approx(0.5)


def test_masks_that_lie_apart_have_a_cldice_of_nothing() -> None:
    truth, prediction = np.zeros((1, 20, 20), bool), np.zeros((1, 20, 20), bool)
    truth[0, 2:5], prediction[0, 12:15] = True, True
    assert centre_line_dice(prediction, truth, volume=True) == 0.0


# ------------------------------------------------------------------------------------------------------ instances


def _squares(*corners: tuple[int, int], side: int = 6) -> np.ndarray:
    mask = np.zeros((1, 60, 60), bool)
    for y, x in corners:
        mask[0, y : y + side, x : x + side] = True
    return mask


def test_instances_match_above_an_iou_of_a_half_and_extra_ones_cost() -> None:
    truth = _squares((5, 5), (5, 30), (30, 5))
    prediction = _squares((5, 5), (6, 30), (33, 5), (50, 50))  # IoU 1, 5/7, 1/3, and one that is not there
    assert instance_f1(prediction, truth, volume=False) == pytest.approx(2 * 2 / (4 + 3))


def test_an_iou_of_exactly_a_half_does_not_match_since_two_could() -> None:
    truth = np.zeros((1, 10, 10), bool)
    truth[0, 0, :8] = True
    half = np.zeros_like(truth)
    half[0, 0, :4] = True
    more = half.copy()
    more[0, 0, 4] = True
    assert instance_f1(half, truth, volume=False) == 0.0
    assert instance_f1(more, truth, volume=False) == 1.0


def test_two_cells_that_are_merged_are_one_instance_that_matches_none() -> None:
    truth = _squares((5, 5), (5, 13))
    merged = truth.copy()
    merged[0, 5:11, 11:13] = True
    assert instance_f1(merged, truth, volume=False) == 0.0


def test_instances_join_over_slices_of_a_volume_and_not_over_frames_of_a_clip() -> None:
    truth = np.repeat(_squares((5, 5)), 4, 0)
    prediction = truth.copy()
    prediction[3] = False
    assert instance_f1(prediction, truth, volume=True) == 1.0  # one body of IoU 3/4
    assert instance_f1(prediction, truth, volume=False) == pytest.approx(2 * 3 / (3 + 4))
