"""What computed tomography suffers: low dose, metal, another window.

The frames are already windowed to 0..1, so that Hounsfield units are shares of the window: of the abdomen's (400 HU),
0.1 is 40 HU. The numbers are ours; noise of a standard abdominal scan is about 10 HU, and a quarter of the dose doubles
it (noise goes with one over the root of the dose).
"""

from __future__ import annotations

import cv2
import numpy as np

from medsam2.evaluation.corruptions import fields
from medsam2.evaluation.corruptions.registry import FrameFunction, Scene, corruption

SUITE, CT = "medical", ("CT",)
METAL_RADIUS = 0.022
"""Of the frame's shorter side."""
METAL_LENGTH = (0.25, 0.45)
"""Share of the slices that the metal passes through."""
STREAK_ANGLES = 48
"""In half a turn."""
STREAK_REACH = 0.35
"""Share of the frame's shorter side over which streaks fade to 1/e."""
AIR = 0.05
"""Darker pixels are air, brighter ones the body."""
FINE, COARSE = 0.7, 2.1
"""Sigmas of the noise's grain: the ramp filter takes out its low frequencies, the reconstruction kernel the highest."""


# Deviation in the middle of the body, as a share of the window: 16 to 100 HU of 400
@corruption(SUITE, (0.04, 0.07, 0.11, 0.17, 0.25), CT)
def low_dose(scene: Scene, deviation: float) -> FrameFunction:
    """Quantum noise after filtered back-projection: grainy in the body's middle, streaky along its longest chord."""

    def grain(rng: np.random.Generator, sigma_x: float, sigma_y: float) -> np.ndarray:
        white = rng.standard_normal((scene.height, scene.width), np.float32)
        sharp = np.asarray(cv2.GaussianBlur(white, (0, 0), sigmaX=sigma_x, sigmaY=sigma_y))
        wider = COARSE / FINE
        noise = sharp - np.asarray(cv2.GaussianBlur(white, (0, 0), sigmaX=sigma_x * wider, sigmaY=sigma_y * wider))
        return np.asarray(noise / max(float(noise.std()), 1e-6), np.float32)

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        rng = scene.own(t)
        body = (fields.luminance(frame) > AIR).astype(np.float32)
        depth = fields.wide_blur(body, 0.12 * scene.side)
        rows = body.mean(1, keepdims=True)  # longer chords let fewer photons through
        along = grain(rng, 8.0 * scene.scale + 1.0, FINE) * rows
        noise = (0.25 + 0.75 * depth) * grain(rng, FINE, FINE) + 0.3 * depth * along
        return frame + deviation * noise[..., None]

    return apply


# Strength of the streaks beside the metal, as a share of the window
@corruption(SUITE, (0.12, 0.25, 0.4, 0.6, 0.9), CT)
def metal_streaks(scene: Scene, strength: float) -> FrameFunction:
    """Two pins through neighbouring slices: white themselves, bright and dark streaks around, dark between them."""
    rng = scene.shared()
    places = _places(scene, rng)
    radius = max(1.5, METAL_RADIUS * scene.side)
    reach = STREAK_REACH * scene.side
    middle = scene.length * rng.uniform(0.35, 0.65)
    half = max(1.0, scene.length * rng.uniform(*METAL_LENGTH) / 2)
    angles = [_angles(rng) for _ in places]
    grid_y, grid_x = np.mgrid[: scene.height, : scene.width].astype(np.float32)
    streaks, metal = np.zeros((2, scene.height, scene.width), np.float32)
    for (x, y), strengths in zip(places, angles, strict=True):
        distance = np.hypot(grid_x - x, grid_y - y)
        turn = np.mod(np.arctan2(grid_y - y, grid_x - x), np.pi) / np.pi * STREAK_ANGLES
        wave = np.interp(turn, np.arange(STREAK_ANGLES + 1), np.append(strengths, strengths[0]))
        streaks += (
            wave * np.exp(-distance / reach) * np.minimum(1.0, 2 * radius / np.maximum(distance, 1)) ** 0.35
        ).astype(np.float32)
        metal = np.maximum(metal, np.clip(radius - distance + 0.5, 0, 1))
    streaks -= 1.2 * _between(places, grid_x, grid_y, radius)

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        beyond = max(0.0, abs(t + 0.5 - middle) - half)  # streaks reach a little beyond the metal: its slices have ends
        fade = np.exp(-((beyond / max(1.0, 0.05 * scene.length)) ** 2))
        body = fields.blur((fields.luminance(frame) > AIR).astype(np.float32), 3 * scene.scale)
        seen = frame + (strength * fade * streaks * (0.12 + 0.88 * body))[..., None]
        present = metal * np.clip(half + 0.5 - abs(t + 0.5 - middle), 0, 1)
        return np.asarray(seen * (1 - present[..., None]) + present[..., None], np.float32)

    return apply


def _places(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float]]:
    """(x, y) of two pins deep in the body of the middle slice, about a quarter of the frame apart."""
    body = fields.luminance(scene.frame(scene.length // 2)) > AIR
    framed = np.pad(body.astype(np.uint8), 1)  # the frame's edge is an edge of the body
    depth = cv2.distanceTransform(framed, cv2.DIST_L2, 3)[1:-1, 1:-1]
    rows, columns = np.nonzero(depth >= 0.5 * depth.max())
    first = int(rng.integers(len(rows)))
    x, y = float(columns[first]), float(rows[first])
    rows, columns = np.nonzero(depth >= 0.2 * depth.max())
    others = rng.integers(0, len(rows), 64)
    gaps = np.hypot(rows[others] - y, columns[others] - x)
    second = others[int(np.argmin(np.abs(gaps - scene.side / 4)))]
    return [(x, y), (float(columns[second]), float(rows[second]))]


def _angles(rng: np.random.Generator) -> np.ndarray:
    """float [STREAK_ANGLES]: strength of the streak at each angle, both signs, mean 0, largest 1."""
    values = rng.standard_normal(STREAK_ANGLES)
    values = values - np.convolve(np.tile(values, 3), np.ones(9) / 9, "same")[STREAK_ANGLES : 2 * STREAK_ANGLES]
    values -= values.mean()
    return np.asarray(values / np.abs(values).max())


def _between(places: list[tuple[float, float]], x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """float32 [H, W] in 0..1: the band that joins the pins, where beam hardening and lack of photons add up."""
    (x0, y0), (x1, y1) = places
    length = max(float(np.hypot(x1 - x0, y1 - y0)), 1.0)
    along = ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length
    across = ((x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)) / length
    beyond = np.maximum(0, np.maximum(-along, along - length))
    return np.asarray(np.exp(-0.5 * (across / (1.2 * radius)) ** 2) * np.exp(-beyond / (0.3 * length)), np.float32)


# Shift of the level, as a share of the window
@corruption(SUITE, (0.06, 0.11, 0.17, 0.24, 0.32), CT)
def window_shift(scene: Scene, shift: float) -> FrameFunction:
    """The window's level is set wrongly: everything is brighter or darker, drawn for the case; the ends are cut off."""
    sign = 1 if scene.shared().random() < 0.5 else -1
    return lambda t, frame: frame + np.float32(sign * shift)
