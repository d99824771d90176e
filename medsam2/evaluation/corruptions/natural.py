"""ImageNet-C without elastic: noise, blur, weather, digital (Hendrycks & Dietterich 2019, arXiv 1903.12261).

The levels are those of the paper. Elastic deformation, the fifteenth corruption, is excluded because it moves the
labels. The paper's lengths are pixels of a 224-pixel image; here they scale with the frame's shorter side. Noise is
per pixel and does not scale.

Three corruptions differ from the paper. The motion kernel is centred; the paper's starts at the pixel, which shifts
the image under the labels. Glass blur samples each pixel from a random neighbour instead of swapping pixels one after
another. Frost is synthesised instead of cropped from six photographs, so nothing has to be downloaded. Weather applies
to camera images only. In a clip, fog drifts, snow is redrawn in each frame and frost stays on the lens.
"""

from __future__ import annotations

import cv2
import numpy as np

from medsam2.evaluation.corruptions import fields
from medsam2.evaluation.corruptions.registry import FrameFunction, Scene, corruption

SUITE = "imagenet_c"
CAMERAS = ("ENDOSCOPY", "OTHER")
FOG_DRIFT = 0.01
"""Drift per frame, as a share of the frame's side."""
ICE_COLOUR = (0.9, 0.96, 1.0)
FROST_MEAN, FROST_DEVIATION = 0.58, 0.16
"""Mean and standard deviation of the paper's six photographs."""
FROST_SEEDS = 40
"""Number of Voronoi cells in the needle pattern."""

# ------------------------------------------------------------------------------------------------------ noise


@corruption(SUITE, (0.08, 0.12, 0.18, 0.26, 0.38))
def gaussian_noise(scene: Scene, deviation: float) -> FrameFunction:
    return lambda t, frame: frame + deviation * scene.frame_rng(t).standard_normal(frame.shape, np.float32)


@corruption(SUITE, (60.0, 25.0, 12.0, 5.0, 3.0))
def shot_noise(scene: Scene, photons: float) -> FrameFunction:
    """Args: photons at full brightness."""
    return lambda t, frame: np.asarray(scene.frame_rng(t).poisson(frame * photons) / photons, np.float32)


@corruption(SUITE, (0.03, 0.06, 0.09, 0.17, 0.27))
def impulse_noise(scene: Scene, share: float) -> FrameFunction:
    """Args: share of the values set to black or white."""

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        rng = scene.frame_rng(t)
        impulses = rng.random(frame.shape, np.float32) < share
        white = rng.random(frame.shape, np.float32) < 0.5
        return np.where(impulses, white.astype(np.float32), frame)

    return apply


# ------------------------------------------------------------------------------------------------------- blur


@corruption(SUITE, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)))
def defocus_blur(scene: Scene, level: tuple[float, float]) -> FrameFunction:
    """Args: (radius of a disk, blur of its edge)."""
    kernel = fields.disk(level[0] * scene.scale, level[1] * scene.scale)
    return lambda t, frame: fields.convolve(frame, kernel)


@corruption(SUITE, ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)))
def glass_blur(scene: Scene, level: tuple[float, int, int]) -> FrameFunction:
    """Args: (sigma, farthest neighbour, number of rounds)."""
    sigma, reach, rounds = level[0] * scene.scale, level[1] * scene.scale, level[2]
    rng = scene.case_rng()  # the glass is in front of the lens, so all frames share it
    # In the paper each swap moves two pixels, so every pixel moves twice per round
    offsets = rng.uniform(-1.0, 1.0, (6, 2, scene.height, scene.width)).astype(np.float32)[: 2 * rounds] * reach
    grid_y, grid_x = np.mgrid[: scene.height, : scene.width].astype(np.float32)

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        image = fields.blur(frame, sigma)
        for dx, dy in offsets:
            image = cv2.remap(image, grid_x + dx, grid_y + dy, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)
        return fields.blur(image.reshape(frame.shape), sigma)

    return apply


@corruption(SUITE, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)))
def motion_blur(scene: Scene, level: tuple[float, float]) -> FrameFunction:
    """Args: (radius, sigma)."""
    angle = scene.case_rng().uniform(-np.pi / 4, np.pi / 4)
    kernel = fields.line(level[0] * scene.scale, level[1] * scene.scale, angle)
    return lambda t, frame: fields.convolve(frame, kernel)


@corruption(SUITE, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)))
def zoom_blur(scene: Scene, level: tuple[float, float]) -> FrameFunction:
    """Args: (upper limit of the zoom factor, exclusive; step)."""
    factors = np.arange(1.0, *level)
    centre_x, centre_y = (scene.width - 1) / 2, (scene.height - 1) / 2

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        total = frame.copy()
        for factor in factors:
            matrix = np.array([[factor, 0, centre_x * (1 - factor)], [0, factor, centre_y * (1 - factor)]], np.float32)
            zoomed = cv2.warpAffine(frame, matrix, (scene.width, scene.height), flags=cv2.INTER_LINEAR)
            total += zoomed.reshape(frame.shape)
        return total / (len(factors) + 1)

    return apply


# ---------------------------------------------------------------------------------------------------- weather


@corruption(
    SUITE,
    (
        (0.1, 0.3, 3.0, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2.0, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4.0, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    CAMERAS,
)
def snow(scene: Scene, level: tuple[float, ...]) -> FrameFunction:
    """Args: (mean, deviation, size, threshold, radius, sigma) of the flakes, and the weight of the original image."""
    mean, deviation, size, threshold, radius, sigma, weight = level
    angle = scene.case_rng().uniform(np.pi / 4, 3 * np.pi / 4)
    kernel = fields.line(radius * scene.scale, sigma * scene.scale, angle)
    size *= scene.scale

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        cells = (int(np.ceil(scene.height / size)) + 1, int(np.ceil(scene.width / size)) + 1)
        grains = scene.frame_rng(t).normal(mean, deviation, cells).astype(np.float32)
        flakes = np.asarray(cv2.resize(grains, (scene.width, scene.height), interpolation=cv2.INTER_LINEAR))
        flakes = np.clip(np.where(flakes < threshold, 0.0, flakes), 0.0, 1.0).astype(np.float32)[..., None]
        flakes = fields.convolve(flakes, kernel)
        white = np.maximum(frame, fields.luminance(frame)[..., None] * 1.5 + 0.5)
        return np.asarray(weight * frame + (1 - weight) * white + flakes + np.rot90(flakes, 2), np.float32)

    return apply


@corruption(SUITE, ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)), CAMERAS)
def frost(scene: Scene, level: tuple[float, float]) -> FrameFunction:
    """Fine needles between the cells of a Voronoi pattern, denser in some areas.

    Args: (weight of the image, weight of the frost).
    """
    rng, height, width = scene.case_rng(), scene.height, scene.width
    seeds = np.ones((height, width), np.uint8)
    seeds[rng.integers(0, height, FROST_SEEDS), rng.integers(0, width, FROST_SEEDS)] = 0
    distance = cv2.distanceTransform(seeds, cv2.DIST_L2, 3) / scene.scale
    bend = fields.clouds(rng, height, width, 1.3, 8)
    needles = 1.0 - np.abs(np.sin(distance * 0.35 + 14.0 * bend))
    rough = fields.clouds(rng, height, width, 1.2, 16)
    cover = fields.clouds(rng, height, width, 2.2)
    pattern = (0.2 * needles**2 + 0.8 * rough**1.5) * (0.35 + 0.9 * cover)
    standard = (pattern - pattern.mean()) / max(float(pattern.std()), 1e-6)
    crystals = np.asarray(np.clip(FROST_MEAN + FROST_DEVIATION * standard, 0.0, 1.0), np.float32)[..., None]
    crystals = crystals * np.array(ICE_COLOUR if scene.frames.shape[3] == 3 else (0.96,), np.float32)
    picture, ice = level
    return lambda t, frame: picture * frame + ice * crystals


@corruption(SUITE, ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)), CAMERAS)
def fog(scene: Scene, level: tuple[float, float]) -> FrameFunction:
    """Args: (amount of fog, decay of the cloud's octaves)."""
    amount, decay = level
    cloud = fields.drifting_clouds(scene.case_rng(), scene.height, scene.width, decay, FOG_DRIFT)
    brightest = float(scene.frames.max()) / 255.0
    return lambda t, frame: (frame + amount * cloud(t)[..., None]) * brightest / (brightest + amount)


# ---------------------------------------------------------------------------------------------------- digital


@corruption(SUITE, (0.1, 0.2, 0.3, 0.4, 0.5))
def brightness(scene: Scene, added: float) -> FrameFunction:
    """Args: what is added to V of HSV."""

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        value = frame.max(axis=2, keepdims=True)
        brighter = np.minimum(value + added, 1.0)
        # Hue and saturation stay, so the channels keep their ratios. Black has no ratios and turns grey.
        return np.where(value > 0, frame * brighter / np.maximum(value, 1e-6), brighter)

    return apply


@corruption(SUITE, (0.4, 0.3, 0.2, 0.1, 0.05))
def contrast(scene: Scene, factor: float) -> FrameFunction:
    """Args: factor of the difference from the frame's mean."""

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        mean = frame.mean(axis=(0, 1), keepdims=True)
        return (frame - mean) * factor + mean

    return apply


@corruption(SUITE, (0.6, 0.5, 0.4, 0.3, 0.25))
def pixelate(scene: Scene, share: float) -> FrameFunction:
    """Args: side of the reduced frame, as a share of the original."""
    size = (max(1, int(scene.width * share)), max(1, int(scene.height * share)))

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        return np.asarray(cv2.resize(small, (scene.width, scene.height), interpolation=cv2.INTER_NEAREST_EXACT))

    return apply


@corruption(SUITE, (25, 18, 15, 10, 7))
def jpeg_compression(scene: Scene, quality: int) -> FrameFunction:
    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        pixels = np.ascontiguousarray(np.rint(frame[..., ::-1] * 255).astype(np.uint8))  # OpenCV writes BGR
        _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
        flag = cv2.IMREAD_COLOR if frame.shape[2] == 3 else cv2.IMREAD_GRAYSCALE
        decoded = np.asarray(cv2.imdecode(data, flag)).reshape(frame.shape)
        return decoded[..., ::-1].astype(np.float32) / 255.0

    return apply
