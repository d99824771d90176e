"""Render ultrasound phantoms: scan lines in a sector or rectangle, attenuation, shadows, interfaces and speckle.

Echoes are computed along the scan lines (D depths, A lines) and then resampled to the picture, as in a scanner.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from medsam2.demo.phantoms.ct import contrasting_value
from medsam2.demo.phantoms.scene import Field, Scene, Structure
from medsam2.demo.phantoms.shapes import Rng, curve, place, smooth_noise, star, strip, wander

DEPTHS, LINES = 160, 120


@dataclass(frozen=True, eq=False)
class Geometry:
    """Mapping between scan lines and pixels.

    Attributes:
        line_x, line_y: float32 [D, A], pixel coordinates of each sample of each line.
        sample_a, sample_d: float32 [H, W], line and depth of each pixel (-1 outside).
        inside: bool [H, W], whether a pixel is scanned.
        field: region in which structures may lie.
    """

    line_x: np.ndarray
    line_y: np.ndarray
    sample_a: np.ndarray
    sample_d: np.ndarray
    inside: np.ndarray
    field: Field


def geometry(rng: Rng, height: int, width: int) -> Geometry:
    """Draw a sector (in two of three cases) or the rectangle of a linear probe."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    depth, line = np.linspace(0, 1, DEPTHS)[:, None], np.linspace(-1, 1, LINES)[None]
    if rng.random() < 0.67:
        opening = rng.uniform(0.62, 0.9)
        start = rng.uniform(0.02, 0.3) * height
        bottom = 0.97 * height
        apex_y = 3 - start * np.cos(opening)
        reach = bottom - apex_y
        if (reach * np.sin(opening)) > 0.5 * width:
            opening = float(np.arcsin(min(0.5 * width / reach, 1.0)))
        radius = start + depth * (reach - start)
        line_x, line_y = width / 2 + radius * np.sin(line * opening), apex_y + radius * np.cos(line * opening)
        angle, distance = np.arctan2(x - width / 2, y - apex_y), np.hypot(x - width / 2, y - apex_y)
        sample_a, sample_d = (angle / opening + 1) / 2, (distance - start) / (reach - start)
        middle = np.array([width / 2, apex_y + start + 0.56 * (reach - start)])
        half = np.array([0.8 * np.sin(opening) * (middle[1] - apex_y), 0.42 * (reach - start)])
    else:
        margin = rng.uniform(0.0, 0.08) * width
        line_x = (width - 1) / 2 + line * (width / 2 - margin) + 0 * depth
        line_y = 2 + depth * (height - 5) + 0 * line
        sample_a, sample_d = (x - margin) / (width - 2 * margin), (y - 2) / (height - 5)
        middle, half = np.array([width / 2, 0.54 * height]), np.array([0.46 * (width - 2 * margin), 0.42 * height])
    inside = (sample_a >= 0) & (sample_a <= 1) & (sample_d >= 0) & (sample_d <= 1)
    return Geometry(
        line_x.astype(np.float32),
        line_y.astype(np.float32),
        np.where(inside, sample_a * (LINES - 1), -1).astype(np.float32),
        np.where(inside, sample_d * (DEPTHS - 1), -1).astype(np.float32),
        inside,
        Field(middle, half),
    )


def surroundings(rng: Rng, scene: Scene, drift: np.ndarray) -> None:
    """Add layers under the skin, a bright fascia or diaphragm, and sometimes bone or gas that casts a shadow."""
    frames, height, width = scene.shape
    left, right = np.array([-20.0, 0.0]), np.array([width + 20.0, 0.0])
    down = np.array([0.0, 1.0])
    for _ in range(int(rng.integers(1, 4))):
        line = curve(rng, left + down * rng.uniform(2, 26), right + down * rng.uniform(2, 26), 5)
        band = strip(line, rng.uniform(1, 4) * scene.scale)
        scene.add(Structure("layer", [[band + drift[frame].astype(np.float32) * 0.3] for frame in range(frames)]))
    if rng.random() < 0.5:
        depth = rng.uniform(0.75, 0.95) * height
        line = curve(rng, left + down * depth, right + down * rng.uniform(0.7, 1.0) * height, 14)
        band = strip(line, rng.uniform(0.8, 1.5) * scene.scale)
        scene.add(Structure("interface", [[band + drift[frame].astype(np.float32)] for frame in range(frames)]))
    for _ in range(int(rng.integers(0, 3))):
        spot = np.array([rng.uniform(0.1, 0.9) * width, rng.uniform(0.1, 0.3) * height])
        path = spot + drift + np.stack([wander(rng, frames, 2), wander(rng, frames, 1)], 1)
        unit = star(rng, frames, 0.15, rng.uniform(1.5, 3)) * [1.0, 0.5]
        scene.add(Structure("reflector", place(unit, path, np.full(frames, rng.uniform(3, 6) * scene.scale))))


def echoes(rng: Rng, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Draw grey level (0-1, after log compression) and attenuation (per depth) of every region [structures + 1]."""
    level = np.zeros(len(scene.structures) + 1, np.float32)
    attenuation = np.full(len(scene.structures) + 1, 0.25, np.float32)
    ground = rng.uniform(0.28, 0.55)
    level[0] = ground
    min_contrast = 0.11 if rng.random() < 0.3 else 0.17
    for position, structure in enumerate(scene.structures, start=1):
        background = ground if structure.host is None else float(level[structure.host + 1])
        kind = structure.kind
        dark = rng.uniform(0.01, 0.09)
        if kind == "layer":
            value = ground + rng.uniform(-0.15, 0.2)
        elif kind in ("interface", "reflector"):
            value = rng.uniform(0.8, 1.0)
        elif kind == "vessel" or (kind in ("organ", "clutter", "lesion", "polyp") and rng.random() < 0.25):
            value = dark if background > 0.22 else background + rng.uniform(0.25, 0.4)
        elif kind == "cavity":
            value = dark if background > 0.25 else background + rng.uniform(0.3, 0.4)
        elif kind == "wall":
            value = contrasting_value(rng, ground, 0.18, 0.4, 0.12, 0.95)
        else:
            value = contrasting_value(rng, background, min_contrast, 0.4, 0.1, 0.9)
        level[position] = value
        attenuation[position] = 0.05 if value < 0.1 else 6.0 if kind == "reflector" else rng.uniform(0.15, 0.4)
    return np.clip(level, 0.01, 1.0), attenuation


def speckle(rng: Rng, frames: int, static_share: float) -> np.ndarray:
    """Draw log-compressed Rayleigh speckle [T, D, A] of mean 0; frames share `static_share` of its variance."""
    axial, lateral = rng.uniform(0.7, 1.1), rng.uniform(1.0, 1.8)
    rows = rng.standard_normal((2 * (frames + 1), DEPTHS, LINES), dtype=np.float32)
    soft = np.stack([cv2.GaussianBlur(row, (0, 0), lateral, sigmaY=axial) for row in rows])
    soft /= soft[0].std()
    static, new = np.float32(static_share**0.5), np.float32((1 - static_share) ** 0.5)
    power = (static * soft[0] + new * soft[2::2]) ** 2 + (static * soft[1] + new * soft[3::2]) ** 2
    return np.log(np.maximum(power, 0.02)).astype(np.float32) - np.float32(0.12)


def render(rng: Rng, scene: Scene, regions: np.ndarray, probe: Geometry) -> np.ndarray:
    """Render a scene as uint8 [T, H, W]."""
    frames, height, width = scene.shape
    level, attenuation = echoes(rng, scene)
    grain = speckle(rng, frames, rng.uniform(0.3, 0.8)) * np.float32(rng.uniform(0.05, 0.085))
    texture = smooth_noise(rng, (1, DEPTHS, LINES), (2, 14))[0] * np.float32(rng.uniform(0.01, 0.035))
    gain = np.interp(np.linspace(0, 1, DEPTHS), [0, 0.1, 1], [rng.uniform(-0.05, 0.15), 0.0, rng.uniform(-0.2, 0.02)])
    border = rng.uniform(0.6, 1.6)
    picture = np.zeros(scene.shape, np.uint8)
    black = rng.uniform(0, 12)
    for frame in range(frames):
        lines = cv2.remap(regions[frame], probe.line_x, probe.line_y, cv2.INTER_NEAREST, borderValue=0)
        echo = level[lines]
        loss = np.cumsum(attenuation[lines] - 0.25, 0, dtype=np.float32) / DEPTHS
        step = np.zeros_like(echo)
        step[1:] = np.abs(echo[1:] - echo[:-1])
        echo = cv2.GaussianBlur(echo + 0.6 * np.float32(border) * step, (0, 0), 0.9, sigmaY=0.6)
        shadow = cv2.GaussianBlur(loss, (0, 0), 2.0, sigmaY=0.5)
        grey = echo + texture + grain[frame] - 0.9 * np.clip(shadow, -0.08, 0.6) + gain[:, None].astype(np.float32)
        pixels = cv2.remap(grey, probe.sample_a, probe.sample_d, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        picture[frame] = np.where(probe.inside, np.clip(pixels * 235 + black, 0, 255), 0)
    return picture
