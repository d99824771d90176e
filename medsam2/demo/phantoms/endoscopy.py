"""Render endoscopy phantoms: lit mucosa with vessels and folds, polyps, organs, and metal instruments.

The mucosa is painted once on a canvas larger than the picture; a moving camera then views canvas and outlines.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from medsam2.demo.phantoms.scene import Field, Scene, Structure
from medsam2.demo.phantoms.shapes import Outlines, Rng, curve, smooth_noise, strip, visits, wander

CANVAS_SCALE = 1.7
COLOURS = {
    "organ": ((0.55, 0.22, 0.16), (0.72, 0.62, 0.36), (0.5, 0.47, 0.33), (0.85, 0.62, 0.5), (0.5, 0.3, 0.32)),
    "polyp": ((0.78, 0.25, 0.22), (0.92, 0.68, 0.6), (0.6, 0.18, 0.2), (0.85, 0.5, 0.3)),
    "vessel": ((0.45, 0.08, 0.1), (0.35, 0.25, 0.45), (0.75, 0.2, 0.18)),
    "wall": ((0.93, 0.66, 0.6), (0.8, 0.3, 0.28), (0.9, 0.75, 0.55), (0.65, 0.3, 0.35)),
    "clutter": ((0.75, 0.66, 0.32), (0.8, 0.4, 0.36), (0.5, 0.35, 0.2), (0.9, 0.72, 0.66)),
    "instrument": ((0.55, 0.56, 0.6), (0.68, 0.68, 0.7), (0.3, 0.31, 0.34), (0.5, 0.55, 0.6)),
}
BULGE_HEIGHTS = {"organ": 7.0, "polyp": 8.0, "lesion": 7.0, "vessel": 4.0, "wall": 5.0, "clutter": 4.0}


@dataclass(frozen=True, eq=False)
class Camera:
    """The path of the camera: `matrices` [T, 2, 3] map canvas pixels to picture pixels; `canvas` is (Hc, Wc)."""

    matrices: np.ndarray
    canvas: tuple[int, int]


def camera(rng: Rng, frames: int, height: int, width: int) -> Camera:
    """Draw a hand-held path that pans, zooms and rotates."""
    tall, wide = int(height * CANVAS_SCALE), int(width * CANVAS_SCALE)
    room = (CANVAS_SCALE - 1) / 2 * 0.85
    pan = np.stack([wander(rng, frames, room * width, 1.2), wander(rng, frames, room * height, 1.2)], 1)
    pan *= rng.uniform(0.3, 1.0)
    zoom, angle = np.exp(wander(rng, frames, 0.16)), wander(rng, frames, rng.uniform(0.02, 0.25))
    matrices = np.zeros((frames, 2, 3), np.float32)
    for frame in range(frames):
        cos, sin = zoom[frame] * np.cos(angle[frame]), zoom[frame] * np.sin(angle[frame])
        linear = np.array([[cos, -sin], [sin, cos]])
        target = np.array([wide / 2, tall / 2]) + pan[frame]
        matrices[frame] = np.column_stack([linear, np.array([width / 2, height / 2]) - linear @ target])
    return Camera(matrices, (tall, wide))


def project(canvas: Scene, view: Camera, scene: Scene) -> None:
    """Add the structures of the canvas to the scene of the picture, in the coordinates of the moving camera."""
    for structure in canvas.structures:
        outlines = [
            [(polygon @ matrix[:, :2].T + matrix[:, 2]).astype(np.float32) for polygon in polygons]
            for polygons, matrix in zip(structure.outlines, view.matrices, strict=True)
        ]
        scene.add(replace(structure, outlines=outlines))


def canvas_field(view: Camera) -> Field:
    """Return the part of the canvas that the camera is likely to see."""
    tall, wide = view.canvas
    return Field(np.array([wide / 2, tall / 2]), np.array([0.34 * wide, 0.34 * tall]))


def instrument(rng: Rng, scene: Scene, label: str | None) -> None:
    """Add a metal shaft that enters from a border, moves and leaves, with two jaws or a blunt end."""
    frames, height, width = scene.shape
    angle = rng.uniform(0, 2 * np.pi)
    outward = np.array([np.cos(angle), np.sin(angle)])
    middle = np.array([width, height]) / 2
    border = middle + outward * 0.75 * max(width, height)
    goal = middle + rng.uniform(-0.22, 0.22, 2) * np.array([width, height])
    half = rng.uniform(4.5, 8.5) * scene.scale
    first, last = rng.uniform(0, 0.3) * frames, rng.uniform(0.65, 1.05) * frames
    spans = [(first, last)]
    if rng.random() < 0.3:
        gap = rng.uniform(first + 3, max(last - 5, first + 4))
        spans = [(first, gap), (gap + rng.uniform(1, 4), last + 2)]
    inward = visits(frames, spans, rng.uniform(2.5, 5)) ** 1.5
    sway = np.stack([wander(rng, frames, 7, 2), wander(rng, frames, 7, 2)], 1) * scene.scale
    opening, jaws = 0.25 + np.abs(wander(rng, frames, 0.5, 2)), rng.random() < 0.65
    outlines: Outlines = []
    for frame in range(frames):
        if inward[frame] <= 0:
            outlines.append([])
            continue
        tip = border + (goal + sway[frame] - border) * inward[frame]
        along = (tip - border) / (np.linalg.norm(tip - border) + 1e-6)
        line = np.stack([border - along * 20, border, tip])
        parts = [strip(line, half)]
        if jaws:
            side = np.array([-along[1], along[0]])
            for sign in (-1, 1):
                end = tip + half * 3.2 * (along * np.cos(opening[frame]) + sign * side * np.sin(opening[frame]))
                parts.append(strip(np.stack([tip + sign * side * half * 0.4, end]), half * np.array([0.6, 0.3])))
        outlines.append(parts)
    scene.add(Structure("instrument", outlines, label))


def mucosa(rng: Rng, view: Camera, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paint colour [Hc, Wc, 3], light [Hc, Wc] of folds and lumen, and relief [Hc, Wc] of the canvas."""
    tall, wide = view.canvas
    base = np.array([rng.uniform(0.7, 0.9), rng.uniform(0.34, 0.52), rng.uniform(0.26, 0.42)], np.float32)
    blotches = smooth_noise(rng, (2, tall, wide), (2, int(rng.integers(5, 14))))
    fine = smooth_noise(rng, (1, tall, wide), (2, 60))[0]
    tint = np.array([0.05, 0.05, 0.04], np.float32) * np.float32(rng.uniform(0.4, 1.2))
    colour = base + blotches[0][..., None] * tint + fine[..., None] * np.float32(0.018)
    veins: np.ndarray = np.zeros((tall, wide), np.float32)
    for _ in range(int(rng.integers(6, 26))):
        start = rng.uniform(0, 1, 2) * [wide, tall]
        end = start + rng.normal(0, 45, 2) * scale
        line = np.round(curve(rng, start, end, 16 * scale)).astype(np.int32)
        cv2.polylines(veins, [line], False, (float(rng.uniform(0.4, 1)),), int(rng.integers(1, 3)), cv2.LINE_AA)
    veins = cv2.GaussianBlur(veins, (0, 0), 0.8)
    colour -= veins[..., None] * np.array([0.14, 0.2, 0.14], np.float32)
    light = 1 + 0.1 * blotches[1]
    y, x = np.mgrid[:tall, :wide].astype(np.float32)
    spot = np.array([wide, tall]) * rng.uniform(0.15, 0.85, 2)
    angle = np.arctan2(y - spot[1], x - spot[0])
    distance = np.hypot(x - spot[0], y - spot[1]) * (1 + 0.12 * np.cos(2 * angle + rng.uniform(0, 6)))
    distance += (5 * scale * np.sin(3 * angle + rng.uniform(0, 6))).astype(np.float32)
    if rng.random() < 0.7:
        fold = np.sin(distance / (rng.uniform(7, 13) * scale))
        light += np.float32(rng.uniform(0.04, 0.16)) * np.where(fold > 0, fold**3, 0.6 * fold)
    if rng.random() < 0.5:
        light *= 1 - 0.85 * np.exp(-((distance / (rng.uniform(20, 40) * scale)) ** 2))
    relief = 0.5 * fine + 0.8 * blotches[1]
    return colour.astype(np.float32), light.astype(np.float32), relief.astype(np.float32)


def colours(rng: Rng, scene: Scene) -> np.ndarray:
    """Draw RGB (0-1) of every region [structures + 1, 3]; a lesion inside an organ differs from it."""
    table = np.zeros((len(scene.structures) + 1, 3), np.float32)
    for position, structure in enumerate(scene.structures, start=1):
        if structure.kind == "cavity":
            table[position] = np.array([0.16, 0.05, 0.04]) * rng.uniform(0.3, 1.2)
            continue
        choices = np.array(COLOURS.get(structure.kind, COLOURS["polyp"]), np.float32)
        colour = choices[int(rng.integers(len(choices)))]
        if structure.kind == "lesion" and structure.host is not None:
            host = table[structure.host + 1]
            colour = choices[int(np.abs(choices - host).sum(1).argmax())]
        table[position] = np.clip(colour + rng.normal(0, 0.04, 3), 0.03, 0.97)
    return table


def domes(scene: Scene, regions: np.ndarray, soft: float) -> np.ndarray:
    """Return the height [H, W] of one frame above the mucosa, where each structure is a rounded hill."""
    height = np.zeros(regions.shape, np.float32)
    for position in np.flatnonzero(np.bincount(regions.ravel()))[1:]:
        kind = scene.structures[position - 1].kind
        mask = (regions == position).astype(np.uint8)
        distance = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
        if kind == "instrument":
            height += 1.6 * np.sqrt(np.maximum(2 * distance * distance.max() - distance**2, 0))
        elif kind == "cavity":
            height -= np.minimum(distance, 6.0)
        else:
            top = BULGE_HEIGHTS.get(kind, 4.0) * soft
            share = np.minimum(distance / (2.2 * top), 1.0)
            height += top * np.sqrt(np.maximum(2 * share - share**2, 0))
    return height


def render(rng: Rng, scene: Scene, regions: np.ndarray, view: Camera) -> np.ndarray:
    """Render a scene as uint8 RGB [T, H, W, 3]."""
    frames, height, width = scene.shape
    colour, light, relief = mucosa(rng, view, scene.scale)
    table = colours(rng, scene)
    bright = np.array([1.0] + [float(s.kind != "cavity") for s in scene.structures], np.float32)
    metal = np.array([False] + [s.kind == "instrument" for s in scene.structures])
    y, x = np.mgrid[:height, :width].astype(np.float32)
    tone = np.array([1.0, rng.uniform(0.9, 1.04), rng.uniform(0.84, 1.06)], np.float32)
    falloff, exposure, glint = rng.uniform(0.45, 0.8), rng.uniform(0.95, 1.3), rng.uniform(18, 45)
    lamp = np.array([width, height]) * rng.uniform(0.4, 0.6, 2)
    distance = np.hypot(x - lamp[0], y - lamp[1]) / np.hypot(width, height) * 2
    vignette = (1 / (1 + (distance / falloff) ** 2 * 0.9)).astype(np.float32)
    edge = np.float32(rng.uniform(0.95, 1.3)) * np.hypot(height, width) / 2
    opening = np.clip((edge - np.hypot(x - width / 2, y - height / 2)) / 3, 0, 1).astype(np.float32)
    noise = rng.standard_normal((frames, height, width), dtype=np.float32) * np.float32(rng.uniform(0.008, 0.02))
    clip = np.zeros((frames, height, width, 3), np.uint8)
    for frame in range(frames):
        size, border = (width, height), cv2.BORDER_REFLECT
        matrix = view.matrices[frame]
        picture = cv2.warpAffine(colour, matrix, size, borderMode=border)
        shade = cv2.warpAffine(light, matrix, size, borderMode=border)
        bumps = cv2.warpAffine(relief, matrix, size, borderMode=border)
        current = regions[frame]
        cover = cv2.GaussianBlur((current > 0).astype(np.float32), (0, 0), 0.8)[..., None]
        object_colour = cv2.GaussianBlur(table[current], (0, 0), 0.8) / np.maximum(cover, 1e-3)
        steel = cv2.GaussianBlur(metal[current].astype(np.float32), (0, 0), 0.8)
        texture = picture - picture.mean((0, 1))
        picture = picture * (1 - cover) + (object_colour + 0.45 * texture * (1 - steel[..., None])) * cover
        shade = shade * (1 - cover[..., 0]) + (0.75 + 0.25 * shade) * cover[..., 0]
        relief_now = cv2.GaussianBlur(domes(scene, current, scene.scale), (0, 0), 1.0) + 1.1 * bumps * (1 - steel)
        slope_x = cv2.Sobel(relief_now, cv2.CV_32F, 1, 0, scale=0.125)
        slope_y = cv2.Sobel(relief_now, cv2.CV_32F, 0, 1, scale=0.125)
        facing = (60 - slope_x * (lamp[0] - x) * 0.7 - slope_y * (lamp[1] - y) * 0.7) / 60
        facing = facing / np.sqrt(1 + slope_x**2 + slope_y**2)
        diffuse = np.clip(0.35 + 0.65 * facing, 0.15, 1.4) * vignette * shade * exposure
        mirror = np.clip(facing - slope_y * 0.25 - slope_x * 0.1, 0, 1.25)
        wet = np.clip((mirror - 0.985) * glint, 0, 1) * (bumps > 1.15) * bright[current]
        wet = wet + steel * np.clip((mirror - 0.8) * 4, 0, 0.9)
        shaded = picture * diffuse[..., None] * tone + (0.85 * cv2.GaussianBlur(wet, (0, 0), 0.7) * vignette)[..., None]
        shaded = (shaded + noise[frame][..., None]) * opening[..., None]
        clip[frame] = np.clip(np.clip(shaded, 0, 1) ** 0.8 * 255, 0, 255)
    return clip
