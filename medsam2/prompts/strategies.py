"""Where evaluation puts its prompts on a slice: boxes and points from a mask. Deterministic.

Legend: H and W pixels. Coordinates are (x, y) indices of pixel centres on the mask's own grid.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

ALL_NEIGHBOURS = np.ones((3, 3), dtype=bool)


def tight_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) around a bool mask [H, W]: the centres of its outermost pixels, as SAM 2's training has it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) == 0:
        raise ValueError("an empty mask has no box")
    return float(columns[0]), float(rows[0]), float(columns[-1]), float(rows[-1])


def deepest_point(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of the pixel of a bool mask [H, W] that is farthest from the outside.

    The Euclidean distance transform treats the picture's border as outside. Of equally deep pixels the one nearest
    to the mask's centroid is taken, so that a rectangle is clicked in its middle.
    """
    if not mask.any():
        raise ValueError("an empty mask has no interior point")
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    rows, columns = np.nonzero(depth >= depth.max() - 1e-6)
    centre = ndimage.center_of_mass(mask)
    best = np.argmin((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2)
    return float(columns[best]), float(rows[best])


def components_by_size(mask: np.ndarray) -> list[np.ndarray]:
    """The 8-connected components of a bool mask [H, W], largest first."""
    labels, count = ndimage.label(mask, structure=ALL_NEIGHBOURS)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return [labels == value + 1 for value in np.argsort(-sizes, kind="stable")]


def component_points(mask: np.ndarray, most: int = 1) -> np.ndarray:
    """float32 [P, 2]: the deepest point of each of the `most` largest components of a bool mask [H, W]."""
    points = [deepest_point(component) for component in components_by_size(mask)[:most]]
    if not points:
        raise ValueError("an empty mask has no component to click")
    return np.asarray(points, dtype=np.float32)
