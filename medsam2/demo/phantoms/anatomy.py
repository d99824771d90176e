"""Draw the unlabelled anatomy of CT and MR volumes: body outline, fat, muscle, bones and lungs, or a close crop."""

from __future__ import annotations

import numpy as np

from medsam2.demo.phantoms.scene import Field, Scene, Structure
from medsam2.demo.phantoms.shapes import Outlines, Rng, place, star, turn, wander


def volume_shape(rng: Rng) -> tuple[int, int, int]:
    """Draw (T, H, W) of a volume: 14-26 slices, 128-176 pixels, often not square."""
    height = int(rng.integers(16, 23)) * 8
    width = height if rng.random() < 0.5 else int(rng.integers(16, 23)) * 8
    return int(rng.integers(14, 27)), height, width


def superellipse(frames: int, half: np.ndarray, power: float, points: int = 72) -> np.ndarray:
    """Return outlines [T, K, 2] of a rounded box with half axes [T, 2] (power 2: ellipse)."""
    angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
    corner = np.stack([np.cos(angles), np.sin(angles)], 1)
    unit = np.sign(corner) * np.abs(corner) ** (2.0 / power)
    return (unit[None] * half[:, None]).astype(np.float32)


def on_every_frame(outlines: np.ndarray) -> Outlines:
    """Convert outlines [T, K, 2] of a structure that is visible on every frame."""
    return [[polygon] for polygon in outlines.astype(np.float32)]


def body(rng: Rng, scene: Scene) -> Field:
    """Add a transverse section with fat, muscle, spine, ribs and sometimes lungs; return the field inside it."""
    frames, height, width = scene.shape
    centre = np.array([width / 2, height * rng.uniform(0.47, 0.52)])
    half = np.array([width * rng.uniform(0.44, 0.49), height * rng.uniform(0.38, 0.46)])
    swell = 1 + np.stack([wander(rng, frames, 0.02), wander(rng, frames, 0.02)], 1)
    power = rng.uniform(2.1, 2.9)
    skin = superellipse(frames, half * swell, power)
    fat = rng.uniform(2.5, 8) * scene.scale
    muscle = rng.uniform(3, 7) * scene.scale
    for kind, inset in (("fat", 0.0), ("muscle", fat), ("inside", fat + muscle)):
        inner = skin * (1 - inset / half)[None, None].astype(np.float32)
        scene.add(Structure(kind, on_every_frame(inner + centre)))
    inner_half = half - fat - muscle
    space = Field(centre, inner_half)
    if rng.random() < 0.3:
        lungs(rng, scene, centre, inner_half)
    spine(rng, scene, space)
    for _ in range(int(rng.integers(0, 9))):
        angle = rng.uniform(0, 2 * np.pi) + wander(rng, frames, 0.25)
        direction = np.stack([np.cos(angle), np.sin(angle)], 1)
        reach = half - fat - 0.5 * muscle
        spot = centre + direction * reach * np.abs(direction).max(1, keepdims=True) ** (2.0 / power - 1)
        size = scene.scale * rng.uniform(1.6, 3.0) * (0.7 + np.abs(wander(rng, frames, 0.6)))
        unit = turn(star(rng, frames, 0.03, 1.8, 0.1), angle)
        scene.add(Structure("bone", place(unit, spot, size)))
    return space


def spine(rng: Rng, scene: Scene, space: Field) -> None:
    """Add a vertebral body at the back of the field, and the spinous process behind it with the canal between."""
    frames = scene.shape[0]
    radius = rng.uniform(9, 13) * scene.scale
    spot = space.centre + np.array([rng.uniform(-2, 2), space.half[1] - 0.9 * radius])
    path = spot + np.stack([wander(rng, frames, 1.0), wander(rng, frames, 1.0)], 1)
    levels = 1 + 0.08 * np.sin(np.arange(frames) * rng.uniform(0.6, 1.2))
    scene.add(Structure("bone", place(star(rng, frames, 0.05, 1.2, 0.2) * [1, 0.95], path, radius * levels)))
    behind = np.array([0, 1.25 * radius])
    process = star(rng, frames, 0.25, 1.0, 0.8) * [1.3, 0.5]
    scene.add(Structure("bone", place(process, path + behind * 1.15, 0.6 * radius * levels)))
    space.occupied.append((float(spot[0]), float(spot[1]), float(radius), True))


def lungs(rng: Rng, scene: Scene, centre: np.ndarray, half: np.ndarray) -> None:
    """Add an air-filled region left and right; structures may lie between and inside them."""
    frames = scene.shape[0]
    first, last = ((0.0, 0.9), (0.9, 0.0), (0.0, 0.3))[int(rng.integers(3))]
    level = np.clip(1.1 - np.linspace(first, last, frames), 0.0, 1.0)
    for side in (-1, 1):
        unit = star(rng, frames, 0.08, 1.0, 0.6) * [0.42, 0.72]
        spot = centre + np.array([side * half[0] * 0.52, -0.05 * half[1]])
        outline = (unit * (half * level[:, None])[:, None] + spot).astype(np.float32)
        shapes = [[polygon] if size > 0.3 else [] for polygon, size in zip(outline, level, strict=True)]
        scene.add(Structure("lung", shapes))


def crop(rng: Rng, scene: Scene) -> Field:
    """Add patches of tissue that fill the picture, a close view without the outline of the body; return its field."""
    frames, height, width = scene.shape
    size = np.array([width, height], float)
    outline = superellipse(frames, np.broadcast_to(size, (frames, 2)), 8.0) + size / 2
    scene.add(Structure("inside", on_every_frame(outline.astype(np.float32))))
    count, first = int(rng.integers(2, 6)), rng.uniform(0, 2 * np.pi)
    for number in range(count):  # around the border, so that no patch encloses another as a ring
        kind = str(rng.choice(["fat", "muscle", "patch", "patch"]))
        angle = first + (number + rng.uniform(-0.2, 0.2)) * 2 * np.pi / count
        spot = size * (0.5 + rng.uniform(0.42, 0.6) * np.array([np.cos(angle), np.sin(angle)]))
        spot = spot + np.stack([wander(rng, frames, 5), wander(rng, frames, 5)], 1)
        unit = star(rng, frames, 0.15, rng.uniform(1, 2.5))
        scene.add(Structure(kind, place(unit, spot, np.full(frames, rng.uniform(18, 42) * scene.scale))))
    return Field(size / 2, 0.47 * size)
