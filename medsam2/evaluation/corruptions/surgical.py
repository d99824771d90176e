"""What goes wrong in the operating room: smoke, blood, low light, another background.

The kinds are those of SegSTRONG-C (Ding et al. 2024, arXiv 2407.11906) as Shen et al. 2024 (arXiv 2408.04098) evaluate
them. There a robot repeats its movement with real smoke, blood and so on, once; here the damage is rendered, so that it
can be had for any clip at five severities. The numbers are ours. Light is mixed in linear intensities (gamma 2.2).
"""

from __future__ import annotations

import cv2
import numpy as np

from medsam2.evaluation.corruptions import fields
from medsam2.evaluation.corruptions.registry import FrameFunction, Scene, corruption

SUITE, CAMERAS = "surgical", ("ENDOSCOPY",)
DISPLAY_GAMMA = 2.2
BLACK = 16
"""Of 255: JPEG leaves no surround quite black."""
SMOKE_COLOUR, BLOOD_COLOUR = (0.72, 0.74, 0.76), (0.66, 0.06, 0.05)
SMOKE_SPEED = 0.02
"""Share of the frame's side in one frame."""
FULL_WELL_PHOTONS = 1500.0
"""Of a white pixel at full light."""
READ_NOISE = 0.004
"""Of the full range."""
BACKGROUND_COLOURS = (  # liver, fat, muscle, stomach, a blue drape: dark and light tones
    ((0.16, 0.05, 0.04), (0.42, 0.16, 0.11)),
    ((0.55, 0.42, 0.14), (0.92, 0.80, 0.45)),
    ((0.40, 0.12, 0.12), (0.78, 0.36, 0.34)),
    ((0.60, 0.34, 0.30), (0.93, 0.70, 0.62)),
    ((0.08, 0.22, 0.32), (0.26, 0.50, 0.62)),
)


# Optical depth of the densest smoke
@corruption(SUITE, (0.5, 0.9, 1.5, 2.3, 3.4), CAMERAS)
def smoke(scene: Scene, depth: float) -> FrameFunction:
    cloud = fields.drifting_clouds(scene.shared(), scene.height, scene.width, 1.9, SMOKE_SPEED)
    colour, depth_seen = _linear(_colour(SMOKE_COLOUR, scene)), -depth * _field_of_view(scene)

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        through = np.exp(depth_seen * cloud(t) ** 1.5)[..., None]
        return _display(_linear(frame) * through + colour * (1 - through))

    return apply


# Share of the field of view that is covered, and how little of the tissue shines through
@corruption(SUITE, ((0.08, 0.6), (0.15, 0.7), (0.24, 0.8), (0.35, 0.88), (0.48, 0.94)), CAMERAS)
def blood(scene: Scene, level: tuple[float, float]) -> FrameFunction:
    share, depth = level
    # Pools hardly move: one cloud, cut at the same height on every frame so that the cover is the asked one at first
    cloud = fields.drifting_clouds(scene.shared(), scene.height, scene.width, 2.4, 0.003)
    view = _field_of_view(scene)
    surface = float(np.quantile(cloud(0)[view > 0.5], 1 - share)) if (view > 0.5).any() else 1.0
    colour = _linear(_colour(BLOOD_COLOUR, scene))
    ripples = fields.drifting_clouds(scene.shared("ripples"), scene.height, scene.width, 1.4, 0.006, 8)
    soft = 0.025

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        height = cloud(t)
        cover = (view * np.clip((height - surface) / soft, 0.0, 1.0))[..., None]
        deep = np.clip((height - surface) / 0.25, 0.0, 1.0)[..., None]
        light = fields.blur(fields.luminance(frame), 3 * scene.scale)[..., None]
        ripple = ripples(t)[..., None]
        # Deep pools are darker, and wet: where a ripple faces the lamp it shines
        pool = colour * (0.3 + 1.2 * light) * (1 - 0.6 * deep) * (0.6 + 0.8 * ripple)
        shine = 0.5 * light * np.clip((ripple - 0.66) * 8, 0.0, 1.0) * np.clip(2 * deep, 0.0, 1.0)
        return _display(_linear(frame) * (1 - depth * cover) + cover * (depth * pool + shine))

    return apply


# What is left of the light, and the severity
@corruption(SUITE, ((0.5, 1), (0.3, 2), (0.18, 3), (0.1, 4), (0.05, 5)), CAMERAS)
def low_light(scene: Scene, level: tuple[float, int]) -> FrameFunction:
    light, severity = level
    y = (np.arange(scene.height) - (scene.height - 1) / 2) / scene.height
    x = (np.arange(scene.width) - (scene.width - 1) / 2) / scene.width
    # A weak lamp also reaches less far to the sides
    falloff = np.exp(-1.6 * severity / 5 * (y[:, None] ** 2 + x[None] ** 2) * 2).astype(np.float32)[..., None]

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        seen = _linear(frame) * (light * falloff)
        deviation = np.sqrt(seen / FULL_WELL_PHOTONS + READ_NOISE**2)  # of the photons and of the chip
        return _display(seen + deviation * scene.own(t).standard_normal(frame.shape, np.float32))

    return apply


# Weight of the other background
@corruption(SUITE, (0.2, 0.4, 0.6, 0.8, 1.0), CAMERAS)
def background_change(scene: Scene, weight: float) -> FrameFunction:
    """Everything that has no label becomes other tissue; its light and shade, and the labelled objects, stay."""
    rng = scene.shared()
    dark, light = (_colour(tone, scene) for tone in BACKGROUND_COLOURS[rng.integers(len(BACKGROUND_COLOURS))])
    relief = fields.drifting_clouds(rng, scene.height, scene.width, 1.35, 0.003, 4)
    soft, view = 1.5 * scene.scale, weight * _field_of_view(scene)[..., None]

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        objects = (scene.planes[:, t] != 0).any(0).astype(np.float32)
        # A sharp edge would show the model where the object ends, so a little of the old surroundings stays
        outside = 1.0 - np.clip(2 * fields.blur(objects, soft), 0.0, 1.0)[..., None]
        shade = fields.wide_blur(fields.luminance(frame), 12 * scene.scale)[..., None]
        shade = shade / max(float(shade.max()), 1e-6)
        tissue = (dark + (light - dark) * relief(t)[..., None]) * (0.15 + 0.85 * shade)
        share = view * outside
        return frame * (1 - share) + tissue * share

    return apply


def _field_of_view(scene: Scene) -> np.ndarray:
    """float32 [H, W] in 0..1: 0 in the black surround of an endoscope's round picture, where nothing can be seen.

    It is what is black on every frame looked at and joined to the frame's edge.
    """
    looked_at = sorted({round(t) for t in np.linspace(0, scene.length - 1, 8)})
    brightest = np.max([scene.frames[t].max(2) for t in looked_at], axis=0)
    _, parts = cv2.connectedComponents((brightest <= BLACK).astype(np.uint8))
    edge = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]))
    seen = ~np.isin(parts, edge[edge > 0])
    return fields.blur(seen.astype(np.float32), scene.scale)


def _linear(frame: np.ndarray) -> np.ndarray:
    return np.power(frame, DISPLAY_GAMMA)


def _display(linear: np.ndarray) -> np.ndarray:
    return np.asarray(np.power(np.clip(linear, 0.0, 1.0), 1 / DISPLAY_GAMMA), np.float32)


def _colour(rgb: tuple[float, float, float], scene: Scene) -> np.ndarray:
    """[C] in as many channels as the frames have."""
    colour = np.array(rgb, np.float32)[None, None]
    return np.asarray(colour[0, 0] if scene.frames.shape[3] == 3 else fields.luminance(colour)[0])
