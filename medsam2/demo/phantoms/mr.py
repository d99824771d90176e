"""Render MR phantoms: contrast that differs per scan, coil bias, Rician noise and an arbitrary scale."""

from __future__ import annotations

import cv2
import numpy as np

from medsam2.demo.phantoms.ct import contrasting_value
from medsam2.demo.phantoms.scene import Scene
from medsam2.demo.phantoms.shapes import Rng, smooth_noise


def signal(rng: Rng, scene: Scene) -> np.ndarray:
    """Draw the relative signal of every region [structures + 1]: 0 (air, bone) to 1 (fat on T1, fluid on T2)."""
    values = np.zeros(len(scene.structures) + 1, np.float32)
    t1_like = rng.random() < 0.5
    inside = rng.uniform(0.25, 0.65)
    min_contrast = 0.11 if rng.random() < 0.3 else 0.18
    fat = rng.uniform(0.75, 1.0) if t1_like or rng.random() < 0.5 else rng.uniform(0.1, 0.3)
    fluid = rng.uniform(0.05, 0.2) if t1_like else rng.uniform(0.8, 1.0)
    tissue_values = {"fat": fat, "muscle": rng.uniform(0.15, 0.4), "inside": inside, "lung": rng.uniform(0.02, 0.06)}
    for position, structure in enumerate(scene.structures, start=1):
        background = inside if structure.host is None else float(values[structure.host + 1])
        kind = structure.kind
        if kind in tissue_values:
            value = tissue_values[kind]
        elif kind == "bone":
            value = rng.uniform(0.05, 0.5)
        elif kind == "patch":
            value = float(np.clip(inside + rng.uniform(-0.12, 0.12), 0.1, 1))
        elif kind in ("vessel", "cavity") and abs(fluid - background) > 0.2:
            value = fluid
        elif kind in ("lesion", "sinus"):
            value = contrasting_value(rng, background, min_contrast, 0.4, 0.04, 1.0)
        else:
            value = contrasting_value(rng, background, min_contrast, 0.5, 0.06, 1.0)
        values[position] = value
    return values


def render(rng: Rng, scene: Scene, regions: np.ndarray) -> np.ndarray:
    """Render a scene as uint16 [T, H, W] in arbitrary units."""
    values = signal(rng, scene)
    volume = values[regions]
    volume *= 1 + np.float32(rng.uniform(0.03, 0.1)) * smooth_noise(rng, scene.shape, (6, int(rng.integers(8, 30))))
    bias = np.exp(np.float32(rng.uniform(0.08, 0.28)) * smooth_noise(rng, scene.shape, (3, 3)))
    level = np.float32(rng.uniform(0.012, 0.05))
    sharpness = rng.uniform(0.5, 1.0)
    real = rng.standard_normal(scene.shape, dtype=np.float32) * level
    imaginary = rng.standard_normal(scene.shape, dtype=np.float32) * level
    for frame in range(scene.shape[0]):
        volume[frame] = cv2.GaussianBlur(volume[frame], (0, 0), sharpness)
    volume *= bias
    magnitude = np.sqrt((volume + real) ** 2 + imaginary**2)
    scale = float(np.exp(rng.uniform(np.log(150), np.log(4000))))
    return np.clip(np.rint(magnitude * scale), 0, 65535).astype(np.uint16)
