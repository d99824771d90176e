"""J and F against the definition of DAVIS, pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from medsam2.evaluation.metrics.metrics import boundary_f, region_j, score


def _blob(seed: int, shape: tuple[int, ...], share: float) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    return noise > np.quantile(noise, 1 - share)


def _boundary_pixels(mask: np.ndarray) -> list[tuple[int, int]]:
    """Pixels that differ from the right, the lower or the lower right one; the border of the frame is none."""
    height, width = mask.shape
    pixels = []
    for y in range(height):
        for x in range(width):
            others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            if any(i < height and j < width and mask[i, j] != mask[y, x] for i, j in others):
                pixels.append((y, x))
    return pixels


def _reference_f(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Precision and recall of boundary pixels within a disk, by all pairs."""
    radius = math.ceil(0.008 * math.hypot(*truth.shape))
    ours, theirs = _boundary_pixels(prediction), _boundary_pixels(truth)
    if not ours or not theirs:
        return float(bool(ours) == bool(theirs))

    def near(points: list, others: list) -> float:
        return sum(any(math.dist(p, o) <= radius for o in others) for p in points) / len(points)

    precision, recall = near(ours, theirs), near(theirs, ours)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("shape", [(24, 30), (40, 140)])  # 1 and 2 pixels of tolerance
@pytest.mark.parametrize("seed", range(3))
def test_f_equals_the_definition_pixel_by_pixel(seed: int, shape: tuple[int, int]) -> None:
    truth = np.stack([_blob(seed, shape, 0.3), _blob(seed + 9, shape, 0.1)])
    prediction = np.stack([_blob(seed, shape, 0.2), _blob(seed + 8, shape, 0.1)])
    expected = np.mean([_reference_f(p, t) for p, t in zip(prediction, truth, strict=True)])
    assert 0 < expected < 1
    assert boundary_f(prediction, truth) == pytest.approx(expected, abs=1e-12)


def test_the_border_of_the_frame_is_no_boundary() -> None:
    truth = np.zeros((1, 40, 40), bool)
    truth[:, :, 20:] = True
    full = np.ones((1, 40, 40), bool)
    assert boundary_f(truth, truth) == 1.0
    assert boundary_f(full, truth) == 0.0  # a full frame has no boundary, so none of the truth's boundary is matched
    assert boundary_f(full, full) == 1.0


def test_j_is_the_mean_over_frames_not_the_iou_of_all_pixels_together() -> None:
    truth, prediction = np.zeros((4, 20, 20), bool), np.zeros((4, 20, 20), bool)
    truth[0, :10, :10] = prediction[0, :10, :10] = True  # 1
    truth[1, :2, :2] = True  # 0: missed, though small
    prediction[2, 0, 0] = True  # 0: a false positive on an empty frame
    scores = score(prediction, truth, (1.0, 1.0, 1.0), volume=False)  # frame 3 is empty in both: 1
    assert scores.j == pytest.approx(0.5)
    assert scores.iou == pytest.approx(100 / 105)


def test_j_of_counts_is_defined_on_empty_frames() -> None:
    both, predicted, true = np.array([0, 0, 3]), np.array([0, 4, 6]), np.array([0, 0, 3])
    assert region_j(both, predicted, true) == pytest.approx((1 + 0 + 0.5) / 3)


@pytest.mark.parametrize(("frames", "volume"), [(1, False), (5, True)])
def test_stills_and_volumes_have_no_j_and_f(frames: int, volume: bool) -> None:
    from medsam2.evaluation.settings import MetricSettings

    truth = np.ones((frames, 8, 8), bool)
    scores = score(truth, truth, (1.0, 1.0, 1.0), volume, settings=MetricSettings())
    assert math.isnan(scores.j) and math.isnan(scores.f) and math.isnan(scores.jf)
