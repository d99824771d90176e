"""The scores of one object, on its native grid, over the whole volume or clip (table: docs/reference/metrics.md).

What is undefined is defined here and in the files that this one calls, for every score: two empty masks agree (1, or
a distance of 0); one empty mask is the worst there is (0, or the diagonal of the image as distance). Empty slices
count, so a false positive on a slice without the object costs. NaN means that a score was not asked for or that
there is nothing to say; averages leave it out.

    J, F         region and boundary score of DAVIS (Perazzi et al., CVPR 2016): means over frames; a frame on which
                 both masks are empty counts 1, one of them empty 0. DAVIS leaves out the first and the last frame of
                 a clip: a protocol says so (`scored: inner`), and then they are not given to this file
    clDice       centre-line Dice (Shit et al., CVPR 2021, arXiv 2003.07311): harmonic mean of the share of the
                 prediction's centre line inside the truth and of the truth's inside the prediction. No centre line
                 inside the other mask: 0. Clips: the mean over the frames where either mask shows something
    instance F1  for a label that holds many things (nuclei, lesions), how many of them were found. Instances are the
                 connected components (26 neighbours in volumes, 8 in frames) of all frames together. Two match where
                 their IoU is above 0.5, which no component can do with two others (Kirillov et al., Panoptic
                 Segmentation, CVPR 2019), so no assignment has to be chosen

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
from medsam2.evaluation.settings import MetricSettings, fits_any

BOUNDARY_SHARE = 0.008  # of the frame's diagonal: how far a boundary may be off


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one object: plain numbers, one column each in cases.parquet.

    Attributes:
        dsc, iou: over all voxels together.
        nsd: surface Dice at a tolerance; in 3D with spacing for volumes, frame by frame for clips and stills (the mean
            over frames where either mask shows something).
        hd95, assd: 95th percentile and mean of the distances between the surfaces, in the unit of the spacing; frame
            by frame as nsd.
        volume_error: (predicted - true) / true; NaN where only the truth is empty.
        j, f, jf: region and boundary score of a clip and their mean (DAVIS); NaN for volumes and stills.
        cldice: centre-line Dice, instance_f1: F1 of connected components; NaN unless asked for.
        present_dsc, present_iou: means over the frames that show the object, of each frame's score; NaN if none does.
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
    """All scores of one object.

    Args:
        prediction, truth: bool [T, H, W].
        spacing: (z, y, x); its first entry is not used unless `volume`.
        volume: slices in space (surfaces in 3D), not frames in time (contours in 2D).
        prompted: the frames that carried a prompt.
        settings: what else is asked for; None is overlaps alone, which is fast.
        structure: its name, which decides the tolerance and whether it is a tube or holds instances.
    """
    both, predicted, true = _count(prediction & truth), _count(prediction), _count(truth)
    found = _overlaps(both, predicted, true, np.isin(np.arange(len(truth)), prompted))
    clip = not volume and len(truth) > 1
    if clip:
        found["j"] = region_j(both, predicted, true)
    if settings is not None:
        shape, (prediction, truth) = truth.shape, _cropped(prediction, truth)
        if settings.surfaces:
            tolerance = settings.tolerance(structure, volume)
            surfaces = surface_scores(prediction, truth, spacing, tolerance, volume, shape)
            found |= {"nsd": surfaces.nsd, "hd95": surfaces.hd95, "assd": surfaces.assd}
            if clip:
                found["f"] = boundary_f(prediction, truth, shape)
                found["jf"] = (found["j"] + found["f"]) / 2
        if fits_any(structure, settings.tubes):
            found["cldice"] = centre_line_dice(prediction, truth, volume)
        if fits_any(structure, settings.instances):
            found["instance_f1"] = instance_f1(prediction, truth, volume)
    absent = true == 0
    return Scores(
        **found,
        absent_all_empty=bool((predicted[absent] == 0).all()) if absent.any() else None,
        voxels=int(true.sum()),
        voxels_predicted=int(predicted.sum()),
        voxels_both=int(both.sum()),
    )


def _overlaps(both: np.ndarray, predicted: np.ndarray, true: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
    """What follows from the counts of each frame, int [T]; chosen: bool [T], the prompted frames."""
    shown = true > 0
    total = int(true.sum())
    size = int(predicted.sum())
    return {
        "dsc": _dice(both, predicted, true),
        "iou": _iou(both, predicted, true),
        "volume_error": (size - total) / total if total else math.nan if size else 0.0,
        "present_dsc": _mean(2 * both[shown] / (predicted + true)[shown]),
        "present_iou": _mean(both[shown] / (predicted + true - both)[shown]),
        "prompt_dsc": _dice(both[chosen], predicted[chosen], true[chosen]) if chosen.any() else math.nan,
        "other_dsc": _dice(both[~chosen], predicted[~chosen], true[~chosen]) if not chosen.all() else math.nan,
        "absent_empty_share": _mean(predicted[~shown] == 0),
    }


def _count(masks: np.ndarray) -> np.ndarray:
    """Pixels of each frame: int [T]; a frame at a time is twenty times faster than a sum over two axes."""
    return np.array([np.count_nonzero(mask) for mask in masks], dtype=np.int64)


def _cropped(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both masks, all frames, where either shows something, and a pixel around: an object is a small part of these."""
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


def iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    """|A and B| / |A or B| of two bool arrays of equal shape; 1 if both are empty."""
    return _iou(*(np.array(np.count_nonzero(x)) for x in (prediction & truth, prediction, truth)))


def _dice(overlap: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    total = int(first.sum() + second.sum())
    return 2.0 * int(overlap.sum()) / total if total else 1.0


def _iou(overlap: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    union = int(first.sum() + second.sum() - overlap.sum())
    return int(overlap.sum()) / union if union else 1.0


# --------------------------------------------------------------------------------- clips, tubes and instances


def region_j(both: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean over frames of the IoU, from the pixel counts of each frame: int [T]."""
    union = predicted + true - both
    return float(np.where(union > 0, both / np.maximum(union, 1), 1.0).mean())


def boundary_f(prediction: np.ndarray, truth: np.ndarray, shape: tuple[int, ...] | None = None) -> float:
    """Mean over frames of the F of boundary pixels that lie within 0.8 % of the diagonal of the other boundary.

    Args:
        prediction, truth: bool [T, H, W].
        shape: of the whole clip (T, H, W) where the masks are a part of it, with a pixel around what they show.
    """
    radius = math.ceil(BOUNDARY_SHARE * math.hypot(*(shape or truth.shape)[1:]))

    def share_near(boundary: np.ndarray, other: np.ndarray) -> float:
        return float((ndimage.distance_transform_edt(~other)[boundary] <= radius).mean())

    return _mean_score(_boundaries(prediction), _boundaries(truth), share_near)


def _boundaries(masks: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one to the right, below or both: bool [T, H, W], as the benchmark draws them.

    The border of the frame is no boundary of the object.
    """
    padded = np.pad(masks, ((0, 0), (0, 1), (0, 1)), mode="edge")
    here, right, below, across = padded[:, :-1, :-1], padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]
    return (here ^ right) | (here ^ below) | (here ^ across)


def centre_line_dice(prediction: np.ndarray, truth: np.ndarray, volume: bool) -> float:
    """clDice of two bool arrays [T, H, W]."""
    from skimage.morphology import skeletonize

    def share_inside(mask: np.ndarray, other: np.ndarray) -> float:
        line = skeletonize(mask, method="lee")
        return float(other[line if line.any() else mask].mean())  # Lee's thinning removes some small blocks whole

    if volume:
        return _harmonic_mean(prediction, truth, share_inside)
    shown = (prediction | truth).any((1, 2))
    return _mean_score(prediction[shown], truth[shown], share_inside) if shown.any() else 1.0


def _mean_score(first: np.ndarray, second: np.ndarray, share: Callable[[np.ndarray, np.ndarray], float]) -> float:
    """Mean over frames of `_harmonic_mean`."""
    return float(np.mean([_harmonic_mean(one, other, share) for one, other in zip(first, second, strict=True)]))


def _harmonic_mean(first: np.ndarray, second: np.ndarray, share: Callable[[np.ndarray, np.ndarray], float]) -> float:
    """Of `share(first, second)` and `share(second, first)`; 1 where both arrays are empty, 0 where one is."""
    if not first.any() or not second.any():
        return float(first.any() == second.any())
    box = ndimage.find_objects((first | second).astype(np.uint8))[0]
    precision, recall = share(first[box], second[box]), share(second[box], first[box])
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def instance_f1(prediction: np.ndarray, truth: np.ndarray, volume: bool) -> float:
    """2 x matched / (predicted + true instances) of two bool arrays [T, H, W]."""
    connected = np.ones((3, 3, 3), bool)
    if not volume:
        connected[[0, 2]] = False  # an instance of one frame is not joined to those of its neighbours
    if not prediction.any() or not truth.any():
        return float(prediction.any() == truth.any())
    first, num_predicted = ndimage.label(prediction, connected)
    second, num_true = ndimage.label(truth, connected)
    overlap = (first > 0) & (second > 0)
    pairs, shared = np.unique(np.stack([first[overlap], second[overlap]]), axis=1, return_counts=True)
    union = np.bincount(first.ravel())[pairs[0]] + np.bincount(second.ravel())[pairs[1]] - shared
    return 2 * int((2 * shared > union).sum()) / (num_predicted + num_true)
