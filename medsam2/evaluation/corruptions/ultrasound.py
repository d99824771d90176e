"""What ultrasound suffers: speckle, acoustic shadow, attenuation. The probe is taken to be at the upper edge."""

from __future__ import annotations

import cv2
import numpy as np

from medsam2.evaluation.corruptions.scene import Corruption, FrameFunction, Scene

SPECKLE = (0.15, 0.2, 0.35, 0.45, 0.6)  # of ImageNet-C's speckle noise (arXiv 1903.12261): deviation of the factor
GRAIN = (1.6, 0.8)  # sigma across and along the beam, pixels of a picture of 224: a beam is wider than a pulse is long
SHADOW = (0.35, 0.55, 0.72, 0.85, 0.95)  # share of the echo that is lost
SHADOW_WIDTH = (0.12, 0.15, 0.18, 0.21, 0.24)  # of the frame's width
ATTENUATION = (0.5, 0.9, 1.4, 2.0, 2.8)  # log of what is lost down to the lower edge


def speckle(scene: Scene, severity: int) -> FrameFunction:
    """Multiplicative noise with the grain of a point spread function; each frame has its own."""
    deviation = SPECKLE[severity - 1]
    sigmas = [max(0.3, sigma * scene.scale) for sigma in GRAIN]

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        white = scene.own(t).standard_normal((scene.height, scene.width), np.float32)
        grain = cv2.GaussianBlur(white, (0, 0), sigmaX=sigmas[0], sigmaY=sigmas[1])
        return frame * (1 + deviation * grain / max(float(grain.std()), 1e-6))[..., None]

    return apply


def acoustic_shadow(scene: Scene, severity: int) -> FrameFunction:
    """Behind a stone or a rib little comes back: a dark wedge from some depth downwards, which moves with the probe."""
    lost, width = SHADOW[severity - 1], SHADOW_WIDTH[severity - 1]
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


def attenuation(scene: Scene, severity: int) -> FrameFunction:
    """The deep echoes are too weak, as in fat tissue or with the wrong time-gain compensation."""
    depth = (np.arange(scene.height, dtype=np.float32) + 0.5) / scene.height
    gain = np.exp(-ATTENUATION[severity - 1] * depth)[:, None, None]
    return lambda t, frame: frame * gain


CORRUPTIONS = (
    Corruption("speckle", "medical", speckle, ("US",)),
    Corruption("acoustic_shadow", "medical", acoustic_shadow, ("US",)),
    Corruption("attenuation", "medical", attenuation, ("US",)),
)
