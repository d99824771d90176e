"""What scans of several modalities suffer: thick slices, shifted contrast."""

from __future__ import annotations

import numpy as np

from medsam2.evaluation.corruptions.scene import Corruption, FrameFunction, Scene

TOMOGRAPHY = ("CT", "MR", "PT")
GREY = ("CT", "MR", "PT", "US", "XRAY")
# How many times thicker: the range of TorchIO's RandomAnisotropy (Billot et al. 2020), 1.5 to 5
THICKNESS = (1.5, 2.0, 3.0, 4.0, 5.0)
# Exponent of the intensities, or one over it: MedMNIST-C (Di Salvo et al. 2024, arXiv 2406.17536) has 1.3 to 2.0
GAMMA = (1.3, 1.5, 1.8, 2.2, 2.8)


def thick_slices(scene: Scene, severity: int) -> FrameFunction:
    """Slices as if scanned so many times thicker, and put back on the grid of the labels by interpolation.

    A thick slice is the mean over its thickness, parts of a slice counted by their share. With fewer slices than one
    thick one holds, the whole stack is averaged.
    """
    thick = min(THICKNESS[severity - 1], float(scene.length))
    # Thick slices are laid from the middle of the stack outwards, so that both ends fare alike
    middle = scene.length / 2
    count = int(np.ceil(scene.length / thick))
    starts = middle + (np.arange(count) - count / 2) * thick
    centres = starts + thick / 2 - 0.5

    def weights(start: float) -> np.ndarray:
        """float64 [T]: the share of each slice in the thick slice from `start` (0 is the upper face of slice 0)."""
        upper = np.arange(scene.length)
        share = np.clip(np.minimum(upper + 1, start + thick) - np.maximum(upper, start), 0, None)
        return share / share.sum()

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        place = float(np.clip(np.interp(t, centres, np.arange(count)), 0, count - 1))
        low = min(int(place), max(count - 2, 0))
        upper_share = place - low
        share = (1 - upper_share) * weights(starts[low])
        if upper_share > 0:
            share = share + upper_share * weights(starts[low + 1])
        needed = np.flatnonzero(share)
        return np.asarray(sum(np.float32(share[z]) * scene.frame(int(z)) for z in needed), np.float32)

    return apply


def contrast_shift(scene: Scene, severity: int) -> FrameFunction:
    """Other weights of the tissues (another sequence, contrast phase or gain): a power of the intensities.

    Black and white stay; whether it gets brighter or darker is drawn for the case.
    """
    exponent = GAMMA[severity - 1] if scene.shared().random() < 0.5 else 1 / GAMMA[severity - 1]
    return lambda t, frame: np.power(frame, np.float32(exponent))


CORRUPTIONS = (
    Corruption("contrast_shift", "medical", contrast_shift, GREY),
    Corruption("thick_slices", "medical", thick_slices, TOMOGRAPHY, ("volume",)),
)
