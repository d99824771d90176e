"""NSD, HD95 and ASSD against brute force, against MONAI, and against geometry."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from medsam2.evaluation.metrics.surfaces import SurfaceScores, distances, surface_scores


def _blob(seed: int, shape: tuple[int, ...], share: float = 0.3) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2.5)
    return noise > np.quantile(noise, 1 - share)


def _contour(mask: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Marching squares by hand: place and length of each element.

    Each 2 x 2 neighbourhood that is mixed holds one element at its centre; its length is that of the segments which
    join the midpoints of the neighbourhood's mixed edges.
    """
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
    return np.array(places), np.array(lengths)


def _weighted_percentile(values: np.ndarray, weights: np.ndarray) -> float:
    """The smallest value that at least 95 % of the weight do not exceed, by trying all."""
    total = weights.sum()
    return min(v for v in values if weights[values <= v].sum() >= 0.95 * total - 1e-9)


def _from_distances(
    p: np.ndarray, wp: np.ndarray, q: np.ndarray, wq: np.ndarray, tolerance: float
) -> tuple[float, float, float]:
    total = wp.sum() + wq.sum()
    near = wp[p <= tolerance].sum() + wq[q <= tolerance].sum()
    mean = ((p * wp).sum() + (q * wq).sum()) / total
    return near / total, max(_weighted_percentile(p, wp), _weighted_percentile(q, wq)), mean


def _values(scores: SurfaceScores) -> tuple[float, float, float]:
    return scores.nsd, scores.hd95, scores.assd


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.7, 1.9)])
def test_contours_give_the_distances_of_a_brute_force_reference(seed: int, spacing: tuple[float, float]) -> None:
    a, b = _blob(seed, (31, 40)), _blob(seed, (31, 40), 0.22) | _blob(seed + 50, (31, 40), 0.05)
    (p, wp), (q, wq) = _contour(a, spacing), _contour(b, spacing)
    apart = np.sqrt(((p[:, None] - q[None]) ** 2).sum(-1))
    for tolerance in (0.5, 1.5, 3.0):
        expected = _from_distances(apart.min(1), wp, apart.min(0), wq, tolerance)
        assert _values(distances(a, b, spacing, tolerance)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (5.0, 0.8, 1.2)])
@pytest.mark.parametrize("seed", [1, 4])
def test_surfaces_in_3d_are_those_of_monai_with_subvoxels(spacing: tuple[float, float, float], seed: int) -> None:
    from monai.metrics import compute_surface_dice
    from monai.metrics.utils import get_edge_surface_distance

    a, b = _blob(seed, (12, 30, 34)), _blob(seed, (12, 30, 34), 0.2)
    one, two = torch.from_numpy(a), torch.from_numpy(b)
    edges, far, areas = get_edge_surface_distance(
        one, two, spacing=spacing, use_subvoxels=True, symmetric=True
    )  # distances at the edges of one to two, and back
    weights = [area[edge].double().numpy() for area, edge in zip(areas, edges, strict=True)]
    expected = _from_distances(far[0].double().numpy(), weights[0], far[1].double().numpy(), weights[1], 2.0)
    scores = distances(a, b, spacing, 2.0)
    assert _values(scores) == pytest.approx(expected, abs=1e-5)
    theirs = compute_surface_dice(
        one[None, None], two[None, None], [2.0], include_background=True, spacing=spacing, use_subvoxels=True
    ).item()
    assert 0.05 < theirs < 1 and scores.nsd == pytest.approx(theirs, abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_hd95_and_assd_are_within_a_voxel_of_monai_s_which_counts_border_voxels() -> None:
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    a, b = _blob(2, (20, 30, 34)), _blob(2, (20, 30, 34), 0.1)
    pair = (torch.from_numpy(a)[None, None], torch.from_numpy(b)[None, None])
    scores = distances(a, b, (1.0, 1.0, 1.0), 1.0)
    options = {"include_background": True, "spacing": (1.0, 1.0, 1.0)}
    theirs = compute_hausdorff_distance(*pair, percentile=95, **options).item()
    assert scores.hd95 > 1 and abs(scores.hd95 - theirs) < math.sqrt(3)
    theirs = compute_average_surface_distance(*pair, symmetric=True, **options).item()
    assert scores.assd > 0.5 and abs(scores.assd - theirs) < 0.5


def test_two_planes_are_as_far_apart_as_they_were_moved() -> None:
    a = np.zeros((30, 40, 40), bool)
    a[:10] = True  # its lower face is cut by the border of the image, in both
    b = np.zeros_like(a)
    b[:14] = True
    scores = distances(a, b, (2.5, 1.0, 1.0), 9.9)
    assert scores.hd95 == pytest.approx(10.0)  # 4 slices of 2.5 mm
    assert 0 < scores.assd < 10.0 and scores.nsd < 1.0
    assert distances(a, b, (2.5, 1.0, 1.0), 10.0).nsd == 1.0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_shift_by_the_tolerance_is_within_it_whatever_the_spacing(steps: int) -> None:
    a = np.zeros((20, 20), bool)
    a[4:12, 4:12] = True
    moved = np.roll(a, steps, 1)
    for step in (0.1, 0.7, 1.1, 3.3):
        assert distances(a, moved, (1.0, step), round(steps * step, 9)).nsd == 1.0
        assert distances(a, moved, (1.0, step), steps * step * 0.99).nsd < 1.0


def test_a_far_speck_moves_hd95_only_if_it_is_more_than_a_twentieth_of_the_surface() -> None:
    truth = np.zeros((80, 80), bool)
    truth[10:40, 10:40] = True
    speck, large = truth.copy(), truth.copy()
    speck[70, 70] = True
    large[65:75, 65:75] = True
    assert distances(speck, truth, (1.0, 1.0), 1.0).hd95 == 0.0
    assert distances(large, truth, (1.0, 1.0), 1.0).hd95 > 30


def test_surface_dice_of_a_shifted_cube_is_what_geometry_says() -> None:
    a = np.zeros((20, 20, 20), bool)
    a[5:15, 5:15, 5:15] = True
    b = np.roll(a, 3, 0)
    spacing = (2.0, 1.0, 1.0)  # the faces across the shift are 6 mm apart
    assert distances(a, a, spacing, 0.0).nsd == 1.0
    assert distances(a, b, spacing, 6.0).nsd == 1.0
    assert 0.5 < distances(a, b, spacing, 1.0).nsd < 1.0
    assert distances(a, b, (1.0, 1.0, 1.0), 3.0).nsd == 1.0


def test_distances_do_not_depend_on_what_lies_around() -> None:
    a, b = _blob(3, (10, 20, 20)), _blob(3, (10, 20, 20), 0.2)
    wide = [np.pad(mask, ((2, 7), (11, 3), (0, 9))) for mask in (a, b)]
    here, there = distances(a, b, (3.0, 1.0, 1.0), 1.0), distances(*wide, (3.0, 1.0, 1.0), 1.0)
    assert _values(here) == pytest.approx(_values(there))


def test_distances_scale_with_the_unit_of_the_spacing() -> None:
    a, b = _blob(5, (10, 20, 20)), _blob(5, (10, 20, 20), 0.2)
    mm, um = distances(a, b, (3.0, 1.0, 0.5), 1.0), distances(a, b, (3000.0, 1000.0, 500.0), 1000.0)
    assert um.nsd == pytest.approx(mm.nsd)
    assert (um.hd95, um.assd) == pytest.approx((1000 * mm.hd95, 1000 * mm.assd))


def test_clips_are_scored_frame_by_frame_over_the_frames_that_show_something() -> None:
    truth, prediction = np.zeros((4, 20, 20), bool), np.zeros((4, 20, 20), bool)
    truth[0, 5:12, 5:12] = prediction[0, 5:12, 5:12] = True
    prediction[2, 5:12, 5:12] = True
    scores = surface_scores(prediction, truth, (0.1, 1.0, 1.0), 1.0, volume=False)
    diagonal = math.hypot(19, 19)  # frame 0 is perfect, frame 2 as wrong as can be, the others do not count
    assert _values(scores) == pytest.approx((0.5, diagonal / 2, diagonal / 2))
