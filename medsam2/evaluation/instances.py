"""F1 of instances: for a label that holds many things (nuclei, lesions), how many of them were found.

Instances are the connected components of each mask (26 neighbours in volumes, 8 in frames). Two of them match where
their IoU is above 0.5, which no component can do with two others (Kirillov et al., Panoptic Segmentation, CVPR 2019),
so no assignment has to be chosen. Both empty: 1; one empty: 0. The instances of all frames of a clip count together.

Legend: T slices or frames, H and W pixels.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def instance_f1(prediction: np.ndarray, truth: np.ndarray, volume: bool) -> float:
    """2 x matched / (predicted + true instances) of two bool arrays [T, H, W]."""
    connected = np.ones((3, 3, 3), bool)
    if not volume:
        connected[[0, 2]] = False  # an instance of one frame is not joined to those of its neighbours
    if not prediction.any() or not truth.any():
        return float(prediction.any() == truth.any())
    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[0]
    first, ours = ndimage.label(prediction[box], connected)
    second, theirs = ndimage.label(truth[box], connected)
    return 2 * _matched(first, second) / (ours + theirs)


def _matched(first: np.ndarray, second: np.ndarray) -> int:
    """Number of pairs of components (int label maps) with an IoU above 0.5."""
    overlap = (first > 0) & (second > 0)
    pairs, shared = np.unique(np.stack([first[overlap], second[overlap]]), axis=1, return_counts=True)
    union = np.bincount(first.ravel())[pairs[0]] + np.bincount(second.ravel())[pairs[1]] - shared
    return int((2 * shared > union).sum())
