"""ImageNet-C's digital damage: brightness, contrast, pixelate, JPEG (Hendrycks & Dietterich 2019, arXiv 1903.12261).

Their parameters; elastic deformation, the fifteenth, is left out: it moves the labels.
"""

from __future__ import annotations

import cv2
import numpy as np

from medsam2.evaluation.corruptions.scene import Corruption, FrameFunction, Scene

BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # added to the value of HSV
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # what is left of the distance to the frame's mean
PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)  # side of the reduced frame
JPEG = (25, 18, 15, 10, 7)  # quality


def brightness(scene: Scene, severity: int) -> FrameFunction:
    added = BRIGHTNESS[severity - 1]

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        value = frame.max(axis=2, keepdims=True)
        brighter = np.minimum(value + added, 1.0)
        # Hue and saturation stay, so the channels keep their ratios; black has none and turns grey
        return np.where(value > 0, frame * brighter / np.maximum(value, 1e-6), brighter)

    return apply


def contrast(scene: Scene, severity: int) -> FrameFunction:
    kept = CONTRAST[severity - 1]

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        mean = frame.mean(axis=(0, 1), keepdims=True)
        return (frame - mean) * kept + mean

    return apply


def pixelate(scene: Scene, severity: int) -> FrameFunction:
    share = PIXELATE[severity - 1]
    size = (max(1, int(scene.width * share)), max(1, int(scene.height * share)))

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        return np.asarray(cv2.resize(small, (scene.width, scene.height), interpolation=cv2.INTER_NEAREST_EXACT))

    return apply


def jpeg_compression(scene: Scene, severity: int) -> FrameFunction:
    quality = JPEG[severity - 1]

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        pixels = np.ascontiguousarray(np.rint(frame[..., ::-1] * 255).astype(np.uint8))  # OpenCV writes BGR
        _, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
        flag = cv2.IMREAD_COLOR if frame.shape[2] == 3 else cv2.IMREAD_GRAYSCALE
        found = np.asarray(cv2.imdecode(data, flag)).reshape(frame.shape)
        return found[..., ::-1].astype(np.float32) / 255.0

    return apply


CORRUPTIONS = (
    Corruption("brightness", "imagenet_c", brightness),
    Corruption("contrast", "imagenet_c", contrast),
    Corruption("pixelate", "imagenet_c", pixelate),
    Corruption("jpeg_compression", "imagenet_c", jpeg_compression),
)
