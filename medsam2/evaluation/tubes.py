"""Centre-line Dice (clDice; Shit et al., CVPR 2021, arXiv 2003.07311): whether a tube is followed, however thick.

The share of the prediction's centre line inside the truth and the share of the truth's centre line inside the
prediction, as harmonic mean. Both empty: 1; one empty, or no centre line inside the other mask: 0. Clips are scored
frame by frame, as the mean over the frames where either mask shows something.

Legend: T slices or frames, H and W pixels.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def centre_line_dice(prediction: np.ndarray, truth: np.ndarray, volume: bool) -> float:
    """clDice of two bool arrays [T, H, W]."""
    if volume:
        return _cldice(prediction, truth)
    shown = np.flatnonzero((prediction | truth).any((1, 2)))
    values = [_cldice(prediction[t], truth[t]) for t in shown]
    return float(np.mean(values)) if values else 1.0


def _cldice(prediction: np.ndarray, truth: np.ndarray) -> float:
    if not prediction.any() or not truth.any():
        return float(prediction.any() == truth.any())
    from skimage.morphology import skeletonize

    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[0]
    ours, theirs = prediction[box], truth[box]
    precision = float(theirs[skeletonize(ours, method="lee")].mean())
    sensitivity = float(ours[skeletonize(theirs, method="lee")].mean())
    return 2 * precision * sensitivity / (precision + sensitivity) if precision + sensitivity else 0.0
