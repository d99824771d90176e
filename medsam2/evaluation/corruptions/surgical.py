"""Corruptions of endoscopic surgery: smoke, blood, low light, another background.

The kinds are those of SegSTRONG-C (Ding et al. 2024, arXiv 2407.11906), evaluated by Shen et al. 2024 (arXiv
2408.04098). In that dataset a robot repeats its movement with real smoke, blood and so on. Here they are rendered,
which works for any clip and at five severities. We chose the levels. Light is mixed in linear intensities (gamma 2.2).
"""

from __future__ import annotations

import cv2
import numpy as np

from medsam2.evaluation.corruptions import fields
from medsam2.evaluation.corruptions.registry import FrameFunction, Scene, corruption

SUITE, CAMERAS = "surgical", ("ENDOSCOPY",)
DISPLAY_GAMMA = 2.2
MAX_BLACK_INTENSITY = 16
"""Out of 255. JPEG compression leaves the black surround slightly above 0."""
SMOKE_COLOUR, BLOOD_COLOUR = (0.72, 0.74, 0.76), (0.66, 0.06, 0.05)
SMOKE_SPEED = 0.02
"""Drift per frame, as a share of the frame's side."""
FULL_WELL_PHOTONS = 1500.0
"""Photons of a white pixel at full light."""
READ_NOISE = 0.004
"""Standard deviation, as a share of the range."""
BACKGROUND_COLOURS = (  # dark and light tone of liver, fat, muscle, stomach and a blue drape
    ((0.16, 0.05, 0.04), (0.42, 0.16, 0.11)),
    ((0.55, 0.42, 0.14), (0.92, 0.80, 0.45)),
    ((0.40, 0.12, 0.12), (0.78, 0.36, 0.34)),
    ((0.60, 0.34, 0.30), (0.93, 0.70, 0.62)),
    ((0.08, 0.22, 0.32), (0.26, 0.50, 0.62)),
)


# Optical depth of the densest smoke
@corruption(SUITE, (0.5, 0.9, 1.5, 2.3, 3.4), CAMERAS)
def smoke(scene: Scene, depth: float) -> FrameFunction:
    cloud = fields.drifting_clouds(scene.case_rng(), scene.height, scene.width, 1.9, SMOKE_SPEED)
    colour, exponent = _linear(_colour(SMOKE_COLOUR, scene)), -depth * _field_of_view(scene)

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        transmission = np.exp(exponent * cloud(t) ** 1.5)[..., None]
        return _display(_linear(frame) * transmission + colour * (1 - transmission))

    return apply


# (share of the field of view that is covered, opacity of the blood)
@corruption(SUITE, ((0.08, 0.6), (0.15, 0.7), (0.24, 0.8), (0.35, 0.88), (0.48, 0.94)), CAMERAS)
def blood(scene: Scene, level: tuple[float, float]) -> FrameFunction:
    share, depth = level
    # Pools hardly move. All frames threshold the same cloud at one height, which covers `share` on the first frame.
    cloud = fields.drifting_clouds(scene.case_rng(), scene.height, scene.width, 2.4, 0.003)
    view = _field_of_view(scene)
    surface = float(np.quantile(cloud(0)[view > 0.5], 1 - share)) if (view > 0.5).any() else 1.0
    colour = _linear(_colour(BLOOD_COLOUR, scene))
    ripples = fields.drifting_clouds(scene.case_rng("ripples"), scene.height, scene.width, 1.4, 0.006, 8)
    soft = 0.025

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        height = cloud(t)
        cover = (view * np.clip((height - surface) / soft, 0.0, 1.0))[..., None]
        deep = np.clip((height - surface) / 0.25, 0.0, 1.0)[..., None]
        light = fields.blur(fields.luminance(frame), 3 * scene.scale)[..., None]
        ripple = ripples(t)[..., None]
        # Deep pools are darker, and their ripples reflect the lamp
        pool = colour * (0.3 + 1.2 * light) * (1 - 0.6 * deep) * (0.6 + 0.8 * ripple)
        shine = 0.5 * light * np.clip((ripple - 0.66) * 8, 0.0, 1.0) * np.clip(2 * deep, 0.0, 1.0)
        return _display(_linear(frame) * (1 - depth * cover) + cover * (depth * pool + shine))

    return apply


# (share of the light that remains, severity)
@corruption(SUITE, ((0.5, 1), (0.3, 2), (0.18, 3), (0.1, 4), (0.05, 5)), CAMERAS)
def low_light(scene: Scene, level: tuple[float, int]) -> FrameFunction:
    light, severity = level
    y = (np.arange(scene.height) - (scene.height - 1) / 2) / scene.height
    x = (np.arange(scene.width) - (scene.width - 1) / 2) / scene.width
    # A weak lamp also illuminates the sides less
    falloff = np.exp(-1.6 * severity / 5 * (y[:, None] ** 2 + x[None] ** 2) * 2).astype(np.float32)[..., None]

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        signal = _linear(frame) * (light * falloff)
        deviation = np.sqrt(signal / FULL_WELL_PHOTONS + READ_NOISE**2)  # shot noise and read noise
        return _display(signal + deviation * scene.frame_rng(t).standard_normal(frame.shape, np.float32))

    return apply


# Weight of the other background
@corruption(SUITE, (0.2, 0.4, 0.6, 0.8, 1.0), CAMERAS)
def background_change(scene: Scene, weight: float) -> FrameFunction:
    """Replaces everything without a label by other tissue; shading and labelled objects stay."""
    rng = scene.case_rng()
    dark, light = (_colour(tone, scene) for tone in BACKGROUND_COLOURS[rng.integers(len(BACKGROUND_COLOURS))])
    relief = fields.drifting_clouds(rng, scene.height, scene.width, 1.35, 0.003, 4)
    soft, view = 1.5 * scene.scale, weight * _field_of_view(scene)[..., None]

    def apply(t: int, frame: np.ndarray) -> np.ndarray:
        objects = (scene.planes[:, t] != 0).any(0).astype(np.float32)
        # A sharp edge would reveal the object's outline to the model, so a rim of the old background stays
        outside = 1.0 - np.clip(2 * fields.blur(objects, soft), 0.0, 1.0)[..., None]
        shade = fields.wide_blur(fields.luminance(frame), 12 * scene.scale)[..., None]
        shade = shade / max(float(shade.max()), 1e-6)
        tissue = (dark + (light - dark) * relief(t)[..., None]) * (0.15 + 0.85 * shade)
        share = view * outside
        return frame * (1 - share) + tissue * share

    return apply


def _field_of_view(scene: Scene) -> np.ndarray:
    """Mask of an endoscope's field of view, float32 [H, W] in 0..1: 0 in the black surround of the round image.

    The surround is the area that is black on eight sampled frames and connected to the frame's edge.
    """
    sampled_frames = sorted({round(t) for t in np.linspace(0, scene.length - 1, 8)})
    brightest = np.max([scene.frames[t].max(2) for t in sampled_frames], axis=0)
    _, components = cv2.connectedComponents((brightest <= MAX_BLACK_INTENSITY).astype(np.uint8))
    edge = np.unique(np.concatenate([components[0], components[-1], components[:, 0], components[:, -1]]))
    visible = ~np.isin(components, edge[edge > 0])
    return fields.blur(visible.astype(np.float32), scene.scale)


def _linear(frame: np.ndarray) -> np.ndarray:
    return np.power(frame, DISPLAY_GAMMA)


def _display(linear: np.ndarray) -> np.ndarray:
    return np.asarray(np.power(np.clip(linear, 0.0, 1.0), 1 / DISPLAY_GAMMA), np.float32)


def _colour(rgb: tuple[float, float, float], scene: Scene) -> np.ndarray:
    """Colour [C] with as many channels as the frames have."""
    colour = np.array(rgb, np.float32)[None, None]
    return np.asarray(colour[0, 0] if scene.frames.shape[3] == 3 else fields.luminance(colour)[0])
