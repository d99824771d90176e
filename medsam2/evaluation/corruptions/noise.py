"""ImageNet-C's noise: Gaussian, shot, impulse (Hendrycks & Dietterich 2019, arXiv 1903.12261; their parameters).

Noise is of the pixel, so it is not scaled with the size of the frame, and each frame has its own. RGB frames have noise
of their own in each channel.
"""

from __future__ import annotations

import numpy as np

from medsam2.evaluation.corruptions.scene import Corruption, FrameFunction, Scene

GAUSSIAN = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation, of the full range
SHOT = (60.0, 25.0, 12.0, 5.0, 3.0)  # photons at full brightness
IMPULSE = (0.03, 0.06, 0.09, 0.17, 0.27)  # share of values that become black or white


def gaussian_noise(scene: Scene, severity: int) -> FrameFunction:
    deviation = GAUSSIAN[severity - 1]

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        return frame + deviation * scene.own(t).standard_normal(frame.shape, np.float32)

    return apply


def shot_noise(scene: Scene, severity: int) -> FrameFunction:
    photons = SHOT[severity - 1]

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        return np.asarray(scene.own(t).poisson(frame * photons) / photons, np.float32)

    return apply


def impulse_noise(scene: Scene, severity: int) -> FrameFunction:
    share = IMPULSE[severity - 1]

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        rng = scene.own(t)
        hit = rng.random(frame.shape, np.float32) < share
        white = rng.random(frame.shape, np.float32) < 0.5
        return np.where(hit, white.astype(np.float32), frame)

    return apply


CORRUPTIONS = (
    Corruption("gaussian_noise", "imagenet_c", gaussian_noise),
    Corruption("shot_noise", "imagenet_c", shot_noise),
    Corruption("impulse_noise", "imagenet_c", impulse_noise),
)
