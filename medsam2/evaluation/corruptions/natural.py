"""ImageNet-C without elastic: noise, blur, weather, digital (Hendrycks & Dietterich 2019, arXiv 1903.12261).

The levels are theirs. Elastic deformation, the fifteenth, moves the labels. Their lengths are pixels of a picture of
224; here they grow with the frame's shorter side. Noise is of the pixel, so it is not scaled.

Three things differ on purpose. The motion kernel has its centre in the middle (theirs starts at the pixel, which shifts
the picture under the labels). The glass draws each pixel from a random neighbour instead of swapping one after another.
Their frost is cut out of six photographs; ours is drawn, so that nothing must be downloaded. Weather is for pictures of
a camera alone. In a clip the fog drifts, snow falls anew in each frame and frost stays on the lens.
"""

from __future__ import annotations

import cv2
import numpy as np

from medsam2.evaluation.corruptions import fields
from medsam2.evaluation.corruptions.registry import FrameFunction, Scene, corruption

SUITE = "imagenet_c"
CAMERAS = ("ENDOSCOPY", "OTHER")
FOG_DRIFT = 0.01
"""Share of the frame's side in one frame."""
ICE_COLOUR = (0.9, 0.96, 1.0)
FROST_MEAN, FROST_DEVIATION = 0.58, 0.16
"""Of the six photographs."""
FROST_SEEDS = 40
"""Cells of the pattern of needles."""

# ------------------------------------------------------------------------------------------------------ noise


@corruption(SUITE, (0.08, 0.12, 0.18, 0.26, 0.38))
def gaussian_noise(scene: Scene, deviation: float) -> FrameFunction:
    return lambda t, frame: frame + deviation * scene.own(t).standard_normal(frame.shape, np.float32)


@corruption(SUITE, (60.0, 25.0, 12.0, 5.0, 3.0))
def shot_noise(scene: Scene, photons: float) -> FrameFunction:
    """Args: photons at full brightness."""
    return lambda t, frame: np.asarray(scene.own(t).poisson(frame * photons) / photons, np.float32)


@corruption(SUITE, (0.03, 0.06, 0.09, 0.17, 0.27))
def impulse_noise(scene: Scene, share: float) -> FrameFunction:
    """Args: share of the values that become black or white."""

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        rng = scene.own(t)
        hit = rng.random(frame.shape, np.float32) < share
        white = rng.random(frame.shape, np.float32) < 0.5
        return np.where(hit, white.astype(np.float32), frame)

    return apply


# ------------------------------------------------------------------------------------------------------- blur


@corruption(SUITE, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)))
def defocus_blur(scene: Scene, level: tuple[float, float]) -> FrameFunction:
    """Args: radius of a disk, and softness of its edge."""
    kernel = fields.disk(level[0] * scene.scale, level[1] * scene.scale)
    return lambda t, frame: fields.convolve(frame, kernel)


@corruption(SUITE, ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)))
def glass_blur(scene: Scene, level: tuple[float, int, int]) -> FrameFunction:
    """Args: sigma, farthest neighbour, rounds."""
    sigma, reach, rounds = level[0] * scene.scale, level[1] * scene.scale, level[2]
    rng = scene.shared()  # the glass is before the lens: the same for all frames
    # A swap moves two pixels, so that each is moved twice a round
    offsets = rng.uniform(-1.0, 1.0, (6, 2, scene.height, scene.width)).astype(np.float32)[: 2 * rounds] * reach
    grid_y, grid_x = np.mgrid[: scene.height, : scene.width].astype(np.float32)

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        seen = fields.blur(frame, sigma)
        for dx, dy in offsets:
            seen = cv2.remap(seen, grid_x + dx, grid_y + dy, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)
        return fields.blur(seen.reshape(frame.shape), sigma)

    return apply


@corruption(SUITE, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)))
def motion_blur(scene: Scene, level: tuple[float, float]) -> FrameFunction:
    """Args: radius and sigma."""
    angle = scene.shared().uniform(-np.pi / 4, np.pi / 4)
    kernel = fields.line(level[0] * scene.scale, level[1] * scene.scale, angle)
    return lambda t, frame: fields.convolve(frame, kernel)


@corruption(SUITE, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)))
def zoom_blur(scene: Scene, level: tuple[float, float]) -> FrameFunction:
    """Args: the factor before which the zoom ends, and its step."""
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
    """Args: mean, deviation, enlargement, threshold, radius and sigma of the flakes; the share of the picture kept."""
    mean, deviation, size, threshold, radius, sigma, kept = level
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


@corruption(SUITE, ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)), CAMERAS)
def frost(scene: Scene, level: tuple[float, float]) -> FrameFunction:
    """Fine needles between the cells of a Voronoi pattern, denser towards a corner.

    Args: weight of the picture, and of the frost.
    """
    rng, height, width = scene.shared(), scene.height, scene.width
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
    """Args: amount, and decay of the octaves of a cloud."""
    amount, decay = level
    cloud = fields.drifting_clouds(scene.shared(), scene.height, scene.width, decay, FOG_DRIFT)
    brightest = float(scene.frames.max()) / 255.0
    return lambda t, frame: (frame + amount * cloud(t)[..., None]) * brightest / (brightest + amount)


# ---------------------------------------------------------------------------------------------------- digital


@corruption(SUITE, (0.1, 0.2, 0.3, 0.4, 0.5))
def brightness(scene: Scene, added: float) -> FrameFunction:
    """Args: what is added to the value of HSV."""

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        value = frame.max(axis=2, keepdims=True)
        brighter = np.minimum(value + added, 1.0)
        # Hue and saturation stay, so the channels keep their ratios; black has none and turns grey
        return np.where(value > 0, frame * brighter / np.maximum(value, 1e-6), brighter)

    return apply


@corruption(SUITE, (0.4, 0.3, 0.2, 0.1, 0.05))
def contrast(scene: Scene, kept: float) -> FrameFunction:
    """Args: what is left of the distance to the frame's mean."""

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        mean = frame.mean(axis=(0, 1), keepdims=True)
        return (frame - mean) * kept + mean

    return apply


@corruption(SUITE, (0.6, 0.5, 0.4, 0.3, 0.25))
def pixelate(scene: Scene, share: float) -> FrameFunction:
    """Args: side of the reduced frame, as a share."""
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
