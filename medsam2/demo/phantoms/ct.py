"""Render CT phantoms: Hounsfield units, contrast medium, correlated reconstruction noise and faint streaks."""

from __future__ import annotations

import cv2
import numpy as np

from medsam2.demo.phantoms.scene import Scene
from medsam2.demo.phantoms.shapes import Rng, smooth_noise

AIR = -1000.0


def contrasting_value(rng: Rng, background: float, low: float, high: float, floor: float, ceiling: float) -> float:
    """Draw a value between `floor` and `ceiling` that differs from `background` by low to high."""
    step = rng.uniform(low, high)
    up, down = background + step, background - step
    if up > ceiling or (down >= floor and rng.random() < 0.5):
        return max(down, floor)
    return min(up, ceiling)


def hounsfield(rng: Rng, scene: Scene) -> np.ndarray:
    """Draw the HU value of every region [structures + 1]; region 0 is air."""
    values = np.full(len(scene.structures) + 1, AIR, np.float32)
    inside = rng.uniform(-115, -85) if rng.random() < 0.55 else rng.uniform(15, 60)
    min_contrast = 28 if rng.random() < 0.3 else 45
    enhanced = rng.random() < 0.6
    blood = rng.uniform(130, 280) if enhanced else rng.uniform(30, 50)
    tissue_values = {"fat": rng.uniform(-115, -90), "muscle": rng.uniform(45, 70), "inside": inside}
    for position, structure in enumerate(scene.structures, start=1):
        background = inside if structure.host is None else float(values[structure.host + 1])
        kind = structure.kind
        if kind in tissue_values:
            value = tissue_values[kind]
        elif kind == "lung":
            value = rng.uniform(-880, -780)
        elif kind == "bone":
            value = rng.uniform(250, 800)
        elif kind == "patch":
            value = inside + rng.uniform(-30, 30)
        elif kind == "vessel":
            value = blood if abs(blood - inside) > 50 else contrasting_value(rng, inside, 70, 150, -20, 300)
        elif kind in ("lesion", "sinus"):
            value = contrasting_value(rng, background, min_contrast, 90, -110, 240)
        elif kind == "cavity":
            value = blood if abs(blood - background) > 50 else contrasting_value(rng, background, 60, 130, -20, 300)
        elif kind == "clutter" and rng.random() < 0.12:
            value = rng.uniform(-900, -500)
        elif inside < 0:
            value = rng.uniform(5, 60) if rng.random() < 0.35 else rng.uniform(60, 160)
        else:
            value = contrasting_value(rng, background, min_contrast, 120, -40, 200)
        values[position] = value
    return values


def streaks(rng: Rng, scene: Scene, regions: np.ndarray) -> np.ndarray:
    """Return a pattern [H, W] of unit amplitude with rays from the first bone, like beam hardening."""
    height, width = regions.shape[1:]
    bones = [s for s in scene.structures if s.kind == "bone" and any(s.outlines)]
    if not bones:
        return np.zeros((height, width), np.float32)
    middle = next(polygons[0].mean(0) for polygons in bones[0].outlines if polygons)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = x - middle[0], y - middle[1]
    rays = np.cos(np.arctan2(y, x) * rng.integers(7, 23) + rng.uniform(0, 6)) * np.exp(-np.hypot(x, y) / (0.35 * width))
    return rays.astype(np.float32)


def render(rng: Rng, scene: Scene, regions: np.ndarray) -> np.ndarray:
    """Render a scene as int16 [T, H, W] in HU, between -1024 and 3071."""
    values = hounsfield(rng, scene)
    volume = values[regions]
    grain = np.where(values > -150, rng.uniform(3, 10), 0.0).astype(np.float32)
    volume += smooth_noise(rng, scene.shape, (6, int(rng.integers(8, 26)))) * grain[regions]
    sharpness, noise_sharpness = rng.uniform(0.55, 0.95), rng.uniform(0.5, 1.0)
    level = rng.uniform(5, 16) * (1 + 2.0 * noise_sharpness)
    noise = rng.standard_normal(scene.shape, dtype=np.float32) * np.float32(level)
    pattern = streaks(rng, scene, regions) * np.float32(rng.uniform(0, 14))
    strength = rng.uniform(0.3, 1.0, scene.shape[0]).astype(np.float32)
    for frame in range(scene.shape[0]):
        soft = cv2.GaussianBlur(volume[frame], (0, 0), sharpness)
        volume[frame] = soft + cv2.GaussianBlur(noise[frame], (0, 0), noise_sharpness) + pattern * strength[frame]
    return np.clip(np.rint(volume), -1024, 3071).astype(np.int16)
