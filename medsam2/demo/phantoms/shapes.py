"""Outlines of moving and deforming structures, as polygons in pixels (x, y), and their rasterisation.

Legend: K points of an outline, T frames, H x W pixels. `Outlines` holds a list of polygons [K, 2] per frame, which is
empty if the structure is not in the frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

Rng = np.random.Generator
Outlines = list[list[np.ndarray]]
POINTS = 56
SUBPIXEL_BITS = 4
SMALLEST_RADIUS = 2.2


def wander(rng: Rng, frames: int, amplitude: float, cycles: float = 1.0) -> np.ndarray:
    """Draw a smooth random path [T] of about +-`amplitude`, with about `cycles` periods over the frames."""
    t = np.linspace(0.0, 2.0 * np.pi, frames)
    path = np.zeros(frames)
    for share in (0.65, 0.35):
        path += share * np.sin(t * cycles * rng.uniform(0.4, 1.3) / share**0.5 + rng.uniform(0, 2 * np.pi))
    return amplitude * path


def rise_and_fall(frames: int, middle: float, half: float, bluntness: float) -> np.ndarray:
    """Return the relative radius [T] of a body: 1 at `middle`, 0 beyond `half` slices; bluntness 2 is a sphere."""
    u = np.abs((np.arange(frames) - middle) / max(half, 0.5))
    return np.where(u < 1.0, (1.0 - np.minimum(u, 1.0) ** bluntness) ** (1.0 / bluntness), 0.0)


def visits(frames: int, spans: Sequence[tuple[float, float]], ramp: float) -> np.ndarray:
    """Return the relative radius [T] of a structure visible during each span, entering and leaving in `ramp` frames."""
    t = np.arange(frames)
    size = np.zeros(frames)
    for start, end in spans:
        inside = np.minimum(t - start, end - t) / ramp
        size = np.maximum(size, np.sqrt(np.clip(inside, 0.0, 1.0)))
    return size


def star(rng: Rng, frames: int, roughness: float, elongation: float, change: float = 1.0) -> np.ndarray:
    """Draw unit outlines [T, K, 2] of a blob whose bumps and direction drift from frame to frame."""
    angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)[None]
    radius = np.ones((frames, POINTS))
    for order in range(2, 8):
        size = roughness * rng.uniform(0.2, 1.0) / (order - 1) ** 0.8
        phase = rng.uniform(0, 2 * np.pi) + wander(rng, frames, 0.7 * change)[:, None]
        radius += size * (1 + wander(rng, frames, 0.4 * change)[:, None]) * np.cos(order * angles + phase)
    radius = np.maximum(radius, 0.35)
    x, y = radius * np.cos(angles) * elongation**0.5, radius * np.sin(angles) / elongation**0.5
    return turn(np.stack([x, y], -1), rng.uniform(0, np.pi) + wander(rng, frames, 0.25 * change))


def bean(rng: Rng, frames: int, elongation: float, bend: float) -> np.ndarray:
    """Draw unit outlines [T, K, 2] of a kidney: an oval bent around its hilum, which faces +x before turning."""
    angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)[None]
    x = np.cos(angles) / elongation**0.5 * (1 + 0.06 * wander(rng, frames, 1.0)[:, None])
    y = np.sin(angles) * elongation**0.5 * np.ones((frames, 1))
    waist = np.exp(-((y / 0.45) ** 2)) * (x > 0) * x
    curve = bend * (1 + wander(rng, frames, 0.25))[:, None]
    x = x + curve * (y**2 / elongation - 0.4) - 0.55 * waist * np.clip(curve * 2, 0, 1)
    return np.stack([x, y], -1)


def turn(points: np.ndarray, angle: np.ndarray | float) -> np.ndarray:
    """Rotate [T, K, 2] by an angle [T] (radians)."""
    angle = np.broadcast_to(np.asarray(angle, float), points.shape[:1])
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x, y = points[..., 0], points[..., 1]
    return np.stack([cos * x - sin * y, sin * x + cos * y], -1)


def place(unit: np.ndarray, centre: np.ndarray, radius: np.ndarray) -> Outlines:
    """Move unit outlines [T, K, 2] to centres [T, 2] with radii [T]; frames below `SMALLEST_RADIUS` are empty."""
    points = (unit * radius[:, None, None] + centre[:, None]).astype(np.float32)
    return [[polygon] if size >= SMALLEST_RADIUS else [] for polygon, size in zip(points, radius, strict=True)]


def strip(line: np.ndarray, width: np.ndarray | float) -> np.ndarray:
    """Return the polygon [2K, 2] of a band along a line [K, 2] with half widths [K] or one half width."""
    tangent = np.gradient(line, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True) + 1e-6
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], 1)
    normal *= np.broadcast_to(np.asarray(width, float), len(line))[:, None]
    return np.concatenate([line + normal, (line - normal)[::-1]]).astype(np.float32)


def curve(rng: Rng, start: np.ndarray, end: np.ndarray, bow: float, points: int = 24) -> np.ndarray:
    """Draw a smooth line [points, 2] from start to end that bows sideways by about `bow` pixels."""
    s = np.linspace(0, 1, points)[:, None]
    along = end - start
    side = np.array([-along[1], along[0]]) / (np.linalg.norm(along) + 1e-6)
    first, second = rng.uniform(-1, 1, 2)
    return start + s * along + side * bow * (first * np.sin(np.pi * s) + 0.5 * second * np.sin(2 * np.pi * s))


def fill(canvas: np.ndarray, polygons: list[np.ndarray], value: float) -> None:
    """Fill polygons (in pixels, with subpixel precision) of one frame [H, W] in place."""
    for polygon in polygons:
        corners = np.round(polygon * (1 << SUBPIXEL_BITS)).astype(np.int32)
        cv2.fillPoly(canvas, [corners], (float(value),), cv2.LINE_8, SUBPIXEL_BITS)


def smooth_noise(rng: Rng, shape: tuple[int, int, int], cells: tuple[int, int]) -> np.ndarray:
    """Draw smooth noise [T, H, W], interpolated from unit normal values on a coarse grid of `cells` (t, in plane)."""
    frames, height, width = shape
    depth, side = max(2, cells[0]), max(2, cells[1])
    coarse = rng.standard_normal((depth, side, side), dtype=np.float32)
    planes = np.stack([cv2.resize(plane, (width, height), interpolation=cv2.INTER_CUBIC) for plane in coarse])
    position = np.linspace(0, depth - 1, frames, dtype=np.float32)
    low = np.minimum(position.astype(int), depth - 2)
    share = (position - low).astype(np.float32)[:, None, None]
    return planes[low] * (1 - share) + planes[low + 1] * share
