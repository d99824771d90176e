"""Scores against an independent reference, and what is defined where they are undefined."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from medsam2.evaluation.metrics import dice, iou, score, surface_dice


def _blob(seed: int, shape: tuple[int, ...], share: float = 0.3) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2.5)
    return noise > np.quantile(noise, 1 - share)


def _reference_surface_dice(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> float:
    """Contours in 2D by brute force: marching squares by hand, all pairs of elements.

    Each 2 x 2 neighbourhood that is mixed holds one element at its centre; its length is that of the segments which
    join the midpoints of the neighbourhood's mixed edges.
    """
    elements = []
    for mask in (a, b):
        padded = np.pad(mask, 1)
        places, lengths = [], []
        for i in range(padded.shape[0] - 1):
            for j in range(padded.shape[1] - 1):
                square = padded[i : i + 2, j : j + 2]
                count = int(square.sum())
                if count in (0, 4):
                    continue
                diagonal = 0.5 * math.hypot(*spacing)
                if count in (1, 3):
                    length = diagonal
                elif square[0, 0] == square[1, 1]:
                    length = 2 * diagonal
                else:
                    length = spacing[0] if square[0, 0] == square[1, 0] else spacing[1]
                places.append((i * spacing[0], j * spacing[1]))
                lengths.append(length)
        elements.append((np.array(places), np.array(lengths)))
    (p, wp), (q, wq) = elements
    distances = np.sqrt(((p[:, None] - q[None]) ** 2).sum(-1))
    near = wp[distances.min(1) <= tolerance].sum() + wq[distances.min(0) <= tolerance].sum()
    return float(near / (wp.sum() + wq.sum()))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 1.9)])
def test_surface_dice_in_2d_equals_a_brute_force_reference(seed: int, spacing: tuple[float, float]) -> None:
    a, b = _blob(seed, (31, 40)), _blob(seed, (31, 40), 0.22) | _blob(seed + 50, (31, 40), 0.05)
    for tolerance in (0.5, 1.5, 3.0):
        assert surface_dice(a, b, spacing, tolerance) == pytest.approx(
            _reference_surface_dice(a, b, spacing, tolerance), abs=1e-9
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.8, 1.2)])
def test_surface_dice_in_3d_equals_monai_with_subvoxels(spacing: tuple[float, float, float]) -> None:
    from monai.metrics import compute_surface_dice

    a, b = _blob(1, (12, 30, 34)), _blob(1, (12, 30, 34), 0.2)
    expected = compute_surface_dice(
        torch.from_numpy(a)[None, None], torch.from_numpy(b)[None, None], [2.0], include_background=True,
        spacing=spacing, use_subvoxels=True,
    ).item()  # fmt: skip
    assert 0.05 < expected < 1
    assert surface_dice(a, b, spacing, 2.0) == pytest.approx(expected, abs=1e-6)


def test_surface_dice_of_a_shifted_cube_is_what_geometry_says() -> None:
    a = np.zeros((20, 20, 20), bool)
    a[5:15, 5:15, 5:15] = True
    b = np.roll(a, 3, 0)
    spacing = (2.0, 1.0, 1.0)  # the faces across the shift are 6 mm apart
    assert surface_dice(a, a, spacing, 0.0) == 1.0
    assert surface_dice(a, b, spacing, 6.0) == 1.0
    assert 0.5 < surface_dice(a, b, spacing, 1.0) < 1.0
    assert surface_dice(a, b, (1.0, 1.0, 1.0), 3.0) == 1.0


def test_surface_dice_does_not_depend_on_what_lies_around() -> None:
    a, b = _blob(3, (10, 20, 20)), _blob(3, (10, 20, 20), 0.2)
    wide = [np.pad(mask, ((2, 7), (11, 3), (0, 9))) for mask in (a, b)]
    assert surface_dice(a, b, (3.0, 1.0, 1.0), 1.0) == pytest.approx(surface_dice(*wide, (3.0, 1.0, 1.0), 1.0))


@pytest.mark.parametrize("volume", [True, False])
def test_both_empty_is_one_and_one_empty_is_zero(volume: bool) -> None:
    empty, full = np.zeros((3, 8, 8), bool), np.ones((3, 8, 8), bool)
    for prediction, truth, expected in ((empty, empty, 1.0), (full, empty, 0.0), (empty, full, 0.0)):
        found = score(prediction, truth, (1.0, 1.0, 1.0), 1.0, volume)
        assert (found.dsc, found.iou, found.nsd) == (expected, expected, expected)


def test_overlap_counts_empty_slices_and_equals_the_definition() -> None:
    truth, prediction = np.zeros((4, 10, 10), bool), np.zeros((4, 10, 10), bool)
    truth[1, :4, :5] = True
    prediction[1, 2:6, :5] = True
    prediction[3, 0, :10] = True  # a false positive on a slice without the object
    assert dice(prediction, truth) == pytest.approx(2 * 10 / (20 + 30))
    assert iou(prediction, truth) == pytest.approx(10 / 40)
    found = score(prediction, truth, (1.0, 1.0, 1.0), 1.0, True, prompted=(1,))
    assert found.dsc == pytest.approx(0.4) and found.iou == pytest.approx(0.25)
    assert found.prompt_dsc == pytest.approx(2 * 10 / 40)
    assert found.other_dsc == 0.0
    assert found.absent_empty_share == pytest.approx(2 / 3) and found.absent_all_empty is False


def test_what_cannot_be_said_is_not_a_number() -> None:
    truth = np.ones((2, 5, 5), bool)
    found = score(truth, truth, (1.0, 1.0, 1.0), math.nan, True, prompted=(0, 1))
    assert math.isnan(found.nsd) and math.isnan(found.other_dsc) and math.isnan(found.absent_empty_share)
    assert found.absent_all_empty is None and found.prompt_dsc == 1.0


def test_clips_are_scored_frame_by_frame_over_the_frames_that_show_something() -> None:
    truth, prediction = np.zeros((4, 20, 20), bool), np.zeros((4, 20, 20), bool)
    truth[0, 5:12, 5:12] = prediction[0, 5:12, 5:12] = True
    prediction[2, 5:12, 5:12] = True
    found = score(prediction, truth, (0.1, 1.0, 1.0), 1.0, volume=False)
    assert found.nsd == pytest.approx(0.5)  # 1 on frame 0, 0 on frame 2, the others do not count
