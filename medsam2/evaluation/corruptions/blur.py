"""ImageNet-C's blurs: defocus, glass, motion, zoom (Hendrycks & Dietterich 2019, arXiv 1903.12261; their parameters).

Their lengths are pixels of a picture of 224; here they grow with the frame's shorter side. Two things differ on
purpose: the motion kernel has its centre in the middle (theirs starts at the pixel, which shifts the picture under the
labels), and the glass draws each pixel from a random neighbour instead of swapping one after another.
"""

from __future__ import annotations

import cv2
import numpy as np

from medsam2.evaluation.corruptions import fields
from medsam2.evaluation.corruptions.scene import Corruption, FrameFunction, Scene

DEFOCUS = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))  # radius, softness of the disk's edge
GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))  # sigma, farthest neighbour, rounds
MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))  # radius, sigma
ZOOM = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))  # end (left out), step


def defocus_blur(scene: Scene, severity: int) -> FrameFunction:
    radius, soft = DEFOCUS[severity - 1]
    kernel = fields.disk(radius * scene.scale, soft * scene.scale)
    return lambda t, frame: fields.convolve(frame, kernel)


def glass_blur(scene: Scene, severity: int) -> FrameFunction:
    sigma, reach, rounds = GLASS[severity - 1]
    sigma, reach_px = sigma * scene.scale, reach * scene.scale
    rng = scene.shared()  # the glass is before the lens: the same for all frames
    # A swap moves two pixels, so that each is moved twice a round
    offsets = rng.uniform(-1.0, 1.0, (6, 2, scene.height, scene.width)).astype(np.float32)[: 2 * rounds] * reach_px
    grid_y, grid_x = np.mgrid[: scene.height, : scene.width].astype(np.float32)

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        seen = fields.blur(frame, sigma)
        for dx, dy in offsets:
            seen = cv2.remap(seen, grid_x + dx, grid_y + dy, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)
        return fields.blur(seen.reshape(frame.shape), sigma)

    return apply


def motion_blur(scene: Scene, severity: int) -> FrameFunction:
    radius, sigma = MOTION[severity - 1]
    angle = scene.shared().uniform(-np.pi / 4, np.pi / 4)
    kernel = fields.line(radius * scene.scale, sigma * scene.scale, angle)
    return lambda t, frame: fields.convolve(frame, kernel)


def zoom_blur(scene: Scene, severity: int) -> FrameFunction:
    end, step = ZOOM[severity - 1]
    factors = np.arange(1.0, end, step)
    centre_x, centre_y = (scene.width - 1) / 2, (scene.height - 1) / 2

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        total = frame.copy()
        for factor in factors:
            matrix = np.array([[factor, 0, centre_x * (1 - factor)], [0, factor, centre_y * (1 - factor)]], np.float32)
            total += cv2.warpAffine(frame, matrix, (scene.width, scene.height), flags=cv2.INTER_LINEAR).reshape(
                frame.shape
            )
        return total / (len(factors) + 1)

    return apply


CORRUPTIONS = (
    Corruption("defocus_blur", "imagenet_c", defocus_blur),
    Corruption("glass_blur", "imagenet_c", glass_blur),
    Corruption("motion_blur", "imagenet_c", motion_blur),
    Corruption("zoom_blur", "imagenet_c", zoom_blur),
)
