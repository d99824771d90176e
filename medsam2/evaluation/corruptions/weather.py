"""ImageNet-C's weather: snow, frost, fog (Hendrycks & Dietterich 2019, arXiv 1903.12261; their parameters).

For pictures of a camera only: a scanner knows no weather. In a clip the fog drifts, snow falls anew in each frame and
frost stays on the lens. Their frost is cut out of six photographs; ours is drawn, so that nothing must be fetched.
"""

from __future__ import annotations

import cv2
import numpy as np

from medsam2.evaluation.corruptions import fields
from medsam2.evaluation.corruptions.scene import Corruption, FrameFunction, Scene

CAMERAS = ("ENDOSCOPY", "OTHER")
# Of flakes: mean, deviation, enlargement, threshold, radius and sigma of the fall; how much of the picture is kept
SNOW = (
    (0.1, 0.3, 3.0, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2.0, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4.0, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
FROST = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))  # weight of the picture, of the frost
FOG = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))  # amount, decay of the octaves
DRIFT = 0.01  # of the frame's side in one frame
ICE = (0.9, 0.96, 1.0)
FROST_MEAN, FROST_DEVIATION = 0.58, 0.16  # of the six photographs


def snow(scene: Scene, severity: int) -> FrameFunction:
    mean, deviation, size, threshold, radius, sigma, kept = SNOW[severity - 1]
    angle = scene.shared().uniform(np.pi / 4, 3 * np.pi / 4)
    kernel = fields.line(radius * scene.scale, sigma * scene.scale, angle)
    size *= scene.scale

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        cells = (int(np.ceil(scene.height / size)) + 1, int(np.ceil(scene.width / size)) + 1)
        grains = scene.own(t).normal(mean, deviation, cells).astype(np.float32)
        flakes = np.asarray(cv2.resize(grains, (scene.width, scene.height), interpolation=cv2.INTER_LINEAR))
        flakes = np.clip(np.where(flakes < threshold, 0.0, flakes), 0.0, 1.0).astype(np.float32)[..., None]
        flakes = fields.convolve(flakes, kernel)
        white = np.maximum(frame, fields.luminance(frame)[..., None] * 1.5 + 0.5)
        return np.asarray(kept * frame + (1 - kept) * white + flakes + np.rot90(flakes, 2), np.float32)

    return apply


def frost(scene: Scene, severity: int) -> FrameFunction:
    picture, ice = FROST[severity - 1]
    crystals = _crystals(scene)[..., None] * np.array(ICE if scene.frames.shape[3] == 3 else (0.96,), np.float32)
    return lambda t, frame: picture * frame + ice * crystals


def _crystals(scene: Scene) -> np.ndarray:
    """float32 [H, W] in 0..1: fine needles between cells of a Voronoi pattern, denser towards a corner."""
    rng = scene.shared()
    height, width = scene.height, scene.width
    seeds = np.ones((height, width), np.uint8)
    count = 40
    seeds[rng.integers(0, height, count), rng.integers(0, width, count)] = 0
    distance = cv2.distanceTransform(seeds, cv2.DIST_L2, 3) / scene.scale
    bend = fields.clouds(rng, height, width, 1.3, 8)
    needles = 1.0 - np.abs(np.sin(distance * 0.35 + 14.0 * bend))
    rough = fields.clouds(rng, height, width, 1.2, 16)
    cover = fields.clouds(rng, height, width, 2.2)
    pattern = (0.2 * needles**2 + 0.8 * rough**1.5) * (0.35 + 0.9 * cover)
    standard = (pattern - pattern.mean()) / max(float(pattern.std()), 1e-6)
    return np.asarray(np.clip(FROST_MEAN + FROST_DEVIATION * standard, 0.0, 1.0), np.float32)


def fog(scene: Scene, severity: int) -> FrameFunction:
    amount, decay = FOG[severity - 1]
    cloud = fields.drifting_clouds(scene.shared(), scene.height, scene.width, decay, DRIFT)
    brightest = float(scene.frames.max()) / 255.0

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        return (frame + amount * cloud(t)[..., None]) * brightest / (brightest + amount)

    return apply


CORRUPTIONS = (
    Corruption("snow", "imagenet_c", snow, CAMERAS),
    Corruption("frost", "imagenet_c", frost, CAMERAS),
    Corruption("fog", "imagenet_c", fog, CAMERAS),
)
