"""Random textures and blur kernels that several corruptions share.

Legend: H and W pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

CLOUD_SIDE_PX = 256  # before the cloud is resized to the frame
DRIFT_CANVAS_SCALE = 1.5  # side of a drifting cloud, relative to the frame's


def clouds(rng: np.random.Generator, height: int, width: int, decay: float, coarsest: int = 2) -> np.ndarray:
    """Draw fractal noise, float32 [H, W] in 0..1: each octave is `decay` times weaker than the one before.

    It looks like the plasma of the diamond-square algorithm, which ImageNet-C uses.

    Args:
        coarsest: cells along a side in the first octave.
    """
    total = np.zeros((CLOUD_SIDE_PX, CLOUD_SIDE_PX), np.float32)
    weight, cells = 1.0, coarsest
    while cells <= CLOUD_SIDE_PX:
        grid = rng.uniform(-1.0, 1.0, (cells + 1, cells + 1)).astype(np.float32)
        total += weight * cv2.resize(grid, (CLOUD_SIDE_PX, CLOUD_SIDE_PX), interpolation=cv2.INTER_CUBIC)
        weight, cells = weight / decay, cells * 2
    total -= total.min()
    total /= max(float(total.max()), 1e-6)
    return np.clip(cv2.resize(total, (width, height), interpolation=cv2.INTER_LINEAR), 0.0, 1.0)


def drifting_clouds(
    rng: np.random.Generator, height: int, width: int, decay: float, speed: float, coarsest: int = 2
) -> Callable[[int], np.ndarray]:
    """Return a function of t that gives float32 [H, W] in 0..1: the mean of two clouds that drift over each other.

    Because their directions differ, the shape changes as it moves.

    Args:
        speed: drift per frame, as a share of the frame's side.
    """
    canvas = (round(height * DRIFT_CANVAS_SCALE), round(width * DRIFT_CANVAS_SCALE))
    layers = [clouds(rng, *canvas, decay, coarsest) for _ in range(2)]
    turns = rng.uniform(0, 2 * np.pi, 2)
    paths = [(speed * width * np.cos(turn), speed * height * np.sin(turn)) for turn in turns]

    def at(t: int) -> np.ndarray:
        pair = [_window(layer, (dx * t, dy * t), height, width) for layer, (dx, dy) in zip(layers, paths, strict=True)]
        return np.asarray(0.5 * (pair[0] + pair[1]), np.float32)

    return at


def _window(layer: np.ndarray, shift: tuple[float, float], height: int, width: int) -> np.ndarray:
    """Cut the centre window of the layer, shifted by (x, y) pixels; the layer is mirrored beyond its edges."""
    start_y, start_x = (layer.shape[0] - height) / 2, (layer.shape[1] - width) / 2
    matrix = np.array([[1, 0, start_x + shift[0]], [0, 1, start_y + shift[1]]], np.float32)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(layer, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT))


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of [H, W] or [H, W, C] with `sigma` in pixels; keeps the shape."""
    if sigma <= 0:
        return image
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)).reshape(image.shape)


def wide_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """`blur` of [H, W] for a large `sigma`, computed on a smaller image because a large kernel is slow."""
    factor = max(1, int(sigma / 6))
    height, width = image.shape
    size = (max(1, width // factor), max(1, height // factor))
    small = blur(np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA)), sigma / factor)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR))


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolution of [H, W, C] with an odd symmetric kernel; mirrors the frame at its edges."""
    return np.asarray(cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)).reshape(image.shape)


def disk(radius: float, soft: float) -> np.ndarray:
    """A disk kernel of `radius` pixels, which may be fractional (drawn 9 times finer), blurred by `soft` pixels."""
    fine, reach = 9, int(np.ceil(radius + 3 * soft))
    axis = (np.arange((2 * reach + 1) * fine) + 0.5) / fine - reach - 0.5
    inside = (axis[:, None] ** 2 + axis[None] ** 2 <= radius**2).astype(np.float32)
    kernel = inside.reshape(2 * reach + 1, fine, 2 * reach + 1, fine).mean((1, 3))
    kernel = blur(kernel, soft)
    return np.asarray(kernel / kernel.sum(), np.float32)


def line(radius: float, sigma: float, angle: float) -> np.ndarray:
    """A centred motion kernel: a Gaussian of `sigma` pixels along a line, truncated at `radius` pixels."""
    reach, fine = int(np.ceil(radius)), 8
    kernel = np.zeros((2 * reach + 3, 2 * reach + 3), np.float32)
    steps = np.linspace(-radius, radius, 2 * fine * (reach + 1) + 1)
    x, y = reach + 1 + steps * np.cos(angle), reach + 1 + steps * np.sin(angle)
    weight = np.exp(-0.5 * (steps / sigma) ** 2)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    for dy in (0, 1):
        for dx in (0, 1):
            share = np.abs(1 - dx - (x - left)) * np.abs(1 - dy - (y - top))
            np.add.at(
                kernel, (np.minimum(top + dy, 2 * reach + 2), np.minimum(left + dx, 2 * reach + 2)), weight * share
            )
    return kernel / kernel.sum()


def luminance(image: np.ndarray) -> np.ndarray:
    """Luminance, float32 [H, W], of a frame [H, W, C] (Rec. 601)."""
    if image.shape[2] == 1:
        return image[..., 0]
    return np.asarray(image @ np.array([0.299, 0.587, 0.114], np.float32), np.float32)
