"""The scores of one object, on its native grid, over the whole volume or clip (table: docs/reference/metrics.md).

Every score is defined for empty masks. Two empty masks agree (score 1, distance 0). If only one is empty, the object
gets the worst value (score 0, distance the diagonal of the image). Empty slices count, so a false positive on a slice
without the object lowers the score. NaN means that a score was not requested or does not exist; averages skip it.

    J, F         region and boundary score of DAVIS (Perazzi et al., CVPR 2016): means over frames. A frame counts 1
                 if both masks are empty and 0 if only one is. DAVIS skips the first and the last frame of a clip; a
                 protocol does so with `scored: inner`, which removes them before this file is called
    clDice       centre-line Dice (Shit et al., CVPR 2021, arXiv 2003.07311): harmonic mean of the share of the
                 prediction's centre line inside the truth and of the truth's inside the prediction. No centre line
                 inside the other mask: 0. Clips: the mean over the frames where either mask shows something
    instance F1  for a label that holds many objects (nuclei, lesions), how many of them were detected. Instances are
                 the connected components (26 neighbours in volumes, 8 in frames) of all frames together. Two match if
                 their IoU is above 0.5. A component matches at most one other (Kirillov et al., Panoptic
                 Segmentation, CVPR 2019), so no assignment problem has to be solved

Distances between surfaces are in `surfaces`.

Legend: T slices or frames, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from medsam2.evaluation.metrics.surfaces import surface_scores
from medsam2.evaluation.settings import MetricSettings, matches_any

BOUNDARY_TOLERANCE = 0.008  # as a share of the frame's diagonal


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one object: plain numbers, one column each in cases.parquet.

    Attributes:
        dsc, iou: over all voxels together.
        nsd: surface Dice at a tolerance; in 3D with spacing for volumes, frame by frame for clips and stills (the mean
            over frames where either mask is not empty).
        hd95, assd: 95th percentile and mean of the distances between the surfaces, in the unit of the spacing; frame
            by frame as nsd.
        volume_error: (predicted - true) / true; NaN where only the truth is empty.
        j, f, jf: region and boundary score of a clip and their mean (DAVIS); NaN for volumes and stills.
        cldice: centre-line Dice, instance_f1: F1 of connected components; NaN unless requested.
        present_dsc, present_iou: means of the frames' scores over the frames that show the object; NaN if none does.
        prompt_dsc: over the prompted frames together. other_dsc: over the rest; NaN where there is none.
        absent_empty_share: of the frames without the object, the share predicted empty; NaN if it is on all frames.
        absent_all_empty: whether that share is 1; None if it is on all frames.
        voxels, voxels_predicted, voxels_both: of the truth, the prediction and their intersection, for pooled averages.
    """

    dsc: float
    iou: float
    nsd: float = math.nan
    hd95: float = math.nan
    assd: float = math.nan
    volume_error: float
    j: float = math.nan
    f: float = math.nan
    jf: float = math.nan
    cldice: float = math.nan
    instance_f1: float = math.nan
    present_dsc: float
    present_iou: float
    prompt_dsc: float
    other_dsc: float
    absent_empty_share: float
    absent_all_empty: bool | None
    voxels: int
    voxels_predicted: int
    voxels_both: int


def score(
    prediction: np.ndarray,
    truth: np.ndarray,
    spacing: tuple[float, float, float],
    volume: bool,
    prompted: tuple[int, ...] = (),
    settings: MetricSettings | None = None,
    structure: str = "",
) -> Scores:
    """Compute all scores of one object.

    Args:
        prediction, truth: bool [T, H, W].
        spacing: (z, y, x); its first entry is used only if `volume`.
        volume: True for slices in space (surfaces in 3D), False for frames in time (contours in 2D).
        prompted: the frames that carried a prompt.
        settings: the scores beyond overlaps; None computes overlaps only, which is fast.
        structure: its name selects the tolerance and whether it is scored as a tube or by instances.
    """
    both, predicted, true = _count(prediction & truth), _count(prediction), _count(truth)
    scores = _overlaps(both, predicted, true, np.isin(np.arange(len(truth)), prompted))
    clip = not volume and len(truth) > 1
    if clip:
        scores["j"] = region_j(both, predicted, true)
    if settings is not None:
        shape, (prediction, truth) = truth.shape, _crop(prediction, truth)
        if settings.surfaces:
            tolerance = settings.tolerance(structure, volume)
            scores |= vars(surface_scores(prediction, truth, spacing, tolerance, volume, shape))
            if clip:
                scores["f"] = boundary_f(prediction, truth, shape)
                scores["jf"] = (scores["j"] + scores["f"]) / 2
        if matches_any(structure, settings.tubes):
            scores["cldice"] = centre_line_dice(prediction, truth, volume)
        if matches_any(structure, settings.instances):
            scores["instance_f1"] = instance_f1(prediction, truth, volume)
    absent = true == 0
    return Scores(
        **scores,
        absent_all_empty=bool((predicted[absent] == 0).all()) if absent.any() else None,
        voxels=int(true.sum()),
        voxels_predicted=int(predicted.sum()),
        voxels_both=int(both.sum()),
    )


def _overlaps(both: np.ndarray, predicted: np.ndarray, true: np.ndarray, prompted: np.ndarray) -> dict[str, float]:
    """Scores from pixel counts per frame, int [T], of the intersection and both masks; prompted: bool [T]."""
    present = true > 0
    total = int(true.sum())
    size = int(predicted.sum())
    return {
        "dsc": _dice(both, predicted, true),
        "iou": _iou(both, predicted, true),
        "volume_error": (size - total) / total if total else math.nan if size else 0.0,
        "present_dsc": _mean(2 * both[present] / (predicted + true)[present]),
        "present_iou": _mean(both[present] / (predicted + true - both)[present]),
        "prompt_dsc": _dice(both[prompted], predicted[prompted], true[prompted]) if prompted.any() else math.nan,
        "other_dsc": _dice(both[~prompted], predicted[~prompted], true[~prompted]) if not prompted.all() else math.nan,
        "absent_empty_share": _mean(predicted[~present] == 0),
    }


def _count(masks: np.ndarray) -> np.ndarray:
    """Pixels per frame: int [T]. Counting frame by frame is twenty times faster than a sum over two axes."""
    return np.array([np.count_nonzero(mask) for mask in masks], dtype=np.int64)


def _crop(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Crop both masks to the box that holds them on any frame, with a margin of one pixel; scores stay the same."""
    boxes = ndimage.find_objects((prediction | truth).any(0).astype(np.uint8))
    if not boxes:
        return prediction, truth
    rows, columns = (slice(max(side.start - 1, 0), side.stop + 1) for side in boxes[0])
    return prediction[:, rows, columns], truth[:, rows, columns]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of two bool arrays of equal shape; 1 if both are empty."""
    return _dice(*(np.array(np.count_nonzero(x)) for x in (prediction & truth, prediction, truth)))


def _dice(overlap: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    total = int(first.sum() + second.sum())
    return 2.0 * int(overlap.sum()) / total if total else 1.0


def _iou(overlap: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    union = int(first.sum() + second.sum() - overlap.sum())
    return int(overlap.sum()) / union if union else 1.0


# --------------------------------------------------------------------------------- clips, tubes and instances


def region_j(both: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean over frames of the IoU, from pixel counts per frame, int [T]."""
    union = predicted + true - both
    return float(np.where(union > 0, both / np.maximum(union, 1), 1.0).mean())


def boundary_f(prediction: np.ndarray, truth: np.ndarray, shape: tuple[int, ...] | None = None) -> float:
    """Mean over frames of the boundary F: boundary pixels match within 0.8 % of the frame's diagonal (DAVIS).

    Args:
        prediction, truth: bool [T, H, W].
        shape: (T, H, W) of the whole clip if the masks are cropped; the crop has a margin of one pixel.
    """
    radius = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*(shape or truth.shape)[1:]))

    def share_near(boundary: np.ndarray, other: np.ndarray) -> float:
        return float((ndimage.distance_transform_edt(~other)[boundary] <= radius).mean())

    return _mean_score(_boundaries(prediction), _boundaries(truth), share_near)


def _boundaries(masks: np.ndarray) -> np.ndarray:
    """Pixels that differ from their neighbour to the right, below or diagonally: bool [T, H, W], as in DAVIS.

    The border of the frame is not a boundary of the object.
    """
    padded = np.pad(masks, ((0, 0), (0, 1), (0, 1)), mode="edge")
    here, right, below, across = padded[:, :-1, :-1], padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]
    return (here ^ right) | (here ^ below) | (here ^ across)


def centre_line_dice(prediction: np.ndarray, truth: np.ndarray, volume: bool) -> float:
    """Centre-line Dice (clDice) of two bool arrays [T, H, W]."""
    from skimage.morphology import skeletonize

    def share_inside(mask: np.ndarray, other: np.ndarray) -> float:
        line = skeletonize(mask, method="lee")
        return float(other[line if line.any() else mask].mean())  # Lee's thinning deletes some small blocks

    if volume:
        return _harmonic_mean(prediction, truth, share_inside)
    shown = (prediction | truth).any((1, 2))
    return _mean_score(prediction[shown], truth[shown], share_inside) if shown.any() else 1.0


def _mean_score(first: np.ndarray, second: np.ndarray, share: Callable[[np.ndarray, np.ndarray], float]) -> float:
    """Mean over frames of `_harmonic_mean`."""
    return float(np.mean([_harmonic_mean(one, other, share) for one, other in zip(first, second, strict=True)]))


def _harmonic_mean(first: np.ndarray, second: np.ndarray, share: Callable[[np.ndarray, np.ndarray], float]) -> float:
    """Harmonic mean of `share(first, second)` and `share(second, first)`; 1 if both arrays are empty, 0 if one is."""
    if not first.any() or not second.any():
        return float(first.any() == second.any())
    box = ndimage.find_objects((first | second).astype(np.uint8))[0]
    precision, recall = share(first[box], second[box]), share(second[box], first[box])
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def instance_f1(prediction: np.ndarray, truth: np.ndarray, volume: bool) -> float:
    """F1 of instances, 2 x matched / (predicted + true), of two bool arrays [T, H, W]."""
    connected = np.ones((3, 3, 3), bool)
    if not volume:
        connected[[0, 2]] = False  # do not connect instances across frames
    if not prediction.any() or not truth.any():
        return float(prediction.any() == truth.any())
    first, num_predicted = ndimage.label(prediction, connected)
    second, num_true = ndimage.label(truth, connected)
    overlap = (first > 0) & (second > 0)
    pairs, shared = np.unique(np.stack([first[overlap], second[overlap]]), axis=1, return_counts=True)
    union = np.bincount(first.ravel())[pairs[0]] + np.bincount(second.ravel())[pairs[1]] - shared
    return 2 * int((2 * shared > union).sum()) / (num_predicted + num_true)
