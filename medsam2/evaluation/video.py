"""J and F of DAVIS (Perazzi et al., CVPR 2016): the region and the boundary score of an object in a clip.

Both are means over frames; a frame on which both masks are empty counts 1, one of them empty 0. DAVIS leaves out the
first and the last frame of a clip: a protocol says so (`scored: inner`), and then they are not given to this file.

Legend: T frames, H and W pixels.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

BOUNDARY_SHARE = 0.008  # of the frame's diagonal: how far a boundary may be off


def region_j(both: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean over frames of the IoU, from the pixel counts of each frame: int [T]."""
    union = predicted + true - both
    values = np.where(union > 0, both / np.maximum(union, 1), 1.0)
    return float(values.mean())


def boundary_f(prediction: np.ndarray, truth: np.ndarray, shape: tuple[int, ...] | None = None) -> float:
    """Mean over frames of the F of boundary pixels that lie within 0.8 % of the diagonal of the other boundary.

    Args:
        prediction, truth: bool [T, H, W].
        shape: of the whole clip (T, H, W) where the masks are a part of it, with a pixel around what they show.
    """
    radius = math.ceil(BOUNDARY_SHARE * math.hypot(*(shape or truth.shape)[1:]))
    pairs = zip(_boundaries(prediction), _boundaries(truth), strict=True)
    return float(np.mean([_f(ours, theirs, radius) for ours, theirs in pairs]))


def _boundaries(masks: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one to the right, below or both: bool [T, H, W], as the benchmark draws them.

    The border of the frame is no boundary of the object.
    """
    padded = np.pad(masks, ((0, 0), (0, 1), (0, 1)), mode="edge")
    here, right, below, across = padded[:, :-1, :-1], padded[:, :-1, 1:], padded[:, 1:, :-1], padded[:, 1:, 1:]
    return (here ^ right) | (here ^ below) | (here ^ across)


def _f(ours: np.ndarray, theirs: np.ndarray, radius: int) -> float:
    """F of two boundaries [H, W]: the harmonic mean of the shares that lie within `radius` of the other."""
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    box = ndimage.find_objects((ours | theirs).astype(np.uint8))[0]
    ours, theirs = ours[box], theirs[box]
    precision = float((ndimage.distance_transform_edt(~theirs)[ours] <= radius).mean())
    recall = float((ndimage.distance_transform_edt(~ours)[theirs] <= radius).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
