"""What scans of several modalities suffer: another contrast, thick slices; and what ultrasound suffers.

The probe of an ultrasound is taken to be at the upper edge.
"""

from __future__ import annotations

import cv2
import numpy as np

from medsam2.evaluation.corruptions.registry import FrameFunction, Scene, corruption

SUITE = "medical"
TOMOGRAPHY = ("CT", "MR", "PT")
GREY = ("CT", "MR", "PT", "US", "XRAY")
GRAIN_SIGMAS_PX = (1.6, 0.8)
"""Of speckle across and along the beam, in pixels of a picture of 224: a beam is wider than a pulse is long."""


# Exponent of the intensities, or one over it: MedMNIST-C (Di Salvo et al. 2024, arXiv 2406.17536) has 1.3 to 2.0
@corruption(SUITE, (1.3, 1.5, 1.8, 2.2, 2.8), GREY)
def contrast_shift(scene: Scene, gamma: float) -> FrameFunction:
    """Other weights of the tissues (another sequence, contrast phase or gain): a power of the intensities.

    Black and white stay; whether it gets brighter or darker is drawn for the case.
    """
    exponent = gamma if scene.shared().random() < 0.5 else 1 / gamma
    return lambda t, frame: np.power(frame, np.float32(exponent))


# How many times thicker: the range of TorchIO's RandomAnisotropy (Billot et al. 2020), 1.5 to 5
@corruption(SUITE, (1.5, 2.0, 3.0, 4.0, 5.0), TOMOGRAPHY, ("volume",))
def thick_slices(scene: Scene, thickness: float) -> FrameFunction:
    """Slices as if scanned so many times thicker, and put back on the grid of the labels by interpolation.

    A thick slice is the mean over its thickness, parts of a slice counted by their share. With fewer slices than one
    thick one holds, the whole stack is averaged.
    """
    thick = min(thickness, float(scene.length))
    # Thick slices are laid from the middle of the stack outwards, so that both ends fare alike
    count = int(np.ceil(scene.length / thick))
    starts = scene.length / 2 + (np.arange(count) - count / 2) * thick
    centres = starts + thick / 2 - 0.5

    def weights(start: float) -> np.ndarray:
        """float64 [T]: the share of each slice in the thick slice from `start` (0 is the upper face of slice 0)."""
        upper = np.arange(scene.length)
        share = np.clip(np.minimum(upper + 1, start + thick) - np.maximum(upper, start), 0, None)
        return share / share.sum()

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        place = float(np.clip(np.interp(t, centres, np.arange(count)), 0, count - 1))
        low = min(int(place), max(count - 2, 0))
        share = (1 - place + low) * weights(starts[low])
        if place > low:
            share = share + (place - low) * weights(starts[low + 1])
        needed = np.flatnonzero(share)
        return np.asarray(sum(np.float32(share[z]) * scene.frame(int(z)) for z in needed), np.float32)

    return apply


# Of ImageNet-C's speckle noise (arXiv 1903.12261): deviation of the factor
@corruption(SUITE, (0.15, 0.2, 0.35, 0.45, 0.6), ("US",))
def speckle(scene: Scene, deviation: float) -> FrameFunction:
    """Multiplicative noise with the grain of a point spread function; each frame has its own."""
    across, along = (max(0.3, sigma * scene.scale) for sigma in GRAIN_SIGMAS_PX)

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        white = scene.own(t).standard_normal((scene.height, scene.width), np.float32)
        grain = cv2.GaussianBlur(white, (0, 0), sigmaX=across, sigmaY=along)
        return frame * (1 + deviation * grain / max(float(grain.std()), 1e-6))[..., None]

    return apply


# Share of the echo that is lost, and width of the shadow as a share of the frame's
@corruption(SUITE, ((0.35, 0.12), (0.55, 0.15), (0.72, 0.18), (0.85, 0.21), (0.95, 0.24)), ("US",))
def acoustic_shadow(scene: Scene, level: tuple[float, float]) -> FrameFunction:
    """Behind a stone or a rib little comes back: a dark wedge from some depth downwards, which moves with the probe."""
    lost, width = level
    rng = scene.shared()
    centre, top = rng.uniform(0.3, 0.7), rng.uniform(0.15, 0.35)
    pace, sway = rng.uniform(0.02, 0.05) * 2 * np.pi, rng.uniform(0, 2 * np.pi)
    y, x = (np.arange(scene.height)[:, None] + 0.5) / scene.height, (np.arange(scene.width)[None] + 0.5) / scene.width

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        here = centre + 0.06 * np.sin(pace * t + sway)
        half = width / 2 * (0.7 + 0.6 * y)  # beams of a convex probe spread
        spread = (here - 0.5) * 0.3 * (y - top)
        across = 1 / (1 + np.exp((np.abs(x - here - spread) - half) / 0.012))
        below = 1 / (1 + np.exp(-(y - top) / 0.015))
        return np.asarray(frame * (1 - lost * across * below)[..., None], np.float32)

    return apply


# Logarithm of what is lost down to the lower edge
@corruption(SUITE, (0.5, 0.9, 1.4, 2.0, 2.8), ("US",))
def attenuation(scene: Scene, loss: float) -> FrameFunction:
    """The deep echoes are too weak, as in fat tissue or with the wrong time-gain compensation."""
    depth = (np.arange(scene.height, dtype=np.float32) + 0.5) / scene.height
    gain = np.exp(-loss * depth)[:, None, None]
    return lambda t, frame: frame * gain
