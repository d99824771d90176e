"""The geometry of a phantom: structures, their motion from frame to frame, and their labels.

The intensity of each region is drawn in ct.py, mr.py, us.py and endoscopy.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from medsam2.demo.phantoms.families import FAMILIES, Choice
from medsam2.demo.phantoms.shapes import (
    Outlines,
    Rng,
    bean,
    curve,
    fill,
    place,
    rise_and_fall,
    star,
    strip,
    turn,
    visits,
    wander,
)

REFERENCE_SIDE = 144.0
"""Sizes below are in pixels of a picture with this mean side; they are scaled for other pictures."""

LAYERS = {"clutter": 1, "organ": 2, "kidney": 3, "sinus": 3, "wall": 4, "cavity": 4, "vessel": 5}
LAYERS |= {"lesion": 6, "polyp": 6}
"""A structure covers those of lower layers; surrounding anatomy (body, bones) is in layer 0, in order of addition."""


@dataclass(frozen=True, eq=False)
class Structure:
    """One region of the picture.

    Attributes:
        kind: tissue name, which determines its intensity.
        outlines: its polygons on each frame.
        label: the family that labels its pixels, or None.
        host: index in the scene of the structure in which it lies, or None for the surroundings.
    """

    kind: str
    outlines: Outlines
    label: str | None = None
    host: int | None = None


@dataclass
class Scene:
    """Structures in the order in which they cover each other. `shape` is (T, H, W)."""

    shape: tuple[int, int, int]
    structures: list[Structure] = field(default_factory=list)

    def add(self, structure: Structure) -> int:
        """Append a structure and return its index, which is its region number minus one."""
        self.structures.append(structure)
        return len(self.structures) - 1

    def sort(self) -> None:
        """Sort the structures by layer and renumber their hosts."""
        order = sorted(range(len(self.structures)), key=lambda position: LAYERS.get(self.structures[position].kind, 0))
        new = {old: position for position, old in enumerate(order)}
        moved = [self.structures[old] for old in order]
        self.structures[:] = [replace(s, host=None if s.host is None else new[s.host]) for s in moved]

    @property
    def scale(self) -> float:
        """Side of this picture relative to `REFERENCE_SIDE`."""
        return float(np.sqrt(self.shape[1] * self.shape[2])) / REFERENCE_SIDE

    def regions(self) -> np.ndarray:
        """Paint uint8 [T, H, W]: 0 for background, otherwise 1 + index of the uppermost structure."""
        canvas = np.zeros(self.shape, np.uint8)
        for position, structure in enumerate(self.structures, start=1):
            for frame, polygons in enumerate(structure.outlines):
                fill(canvas[frame], polygons, position)
        return canvas

    def labels(self, regions: np.ndarray, ids: dict[str, int]) -> np.ndarray:
        """Return uint8 [T, H, W], the label values of a region map."""
        table = np.zeros(len(self.structures) + 1, np.uint8)
        for position, structure in enumerate(self.structures, start=1):
            table[position] = ids.get(structure.label or "", 0)
        return table[regions]


def pick_labels(rng: Rng, choice: Choice) -> tuple[str, ...]:
    """Draw the families that one case labels: all if `label_all`, else a random part of at least two if possible."""
    if choice.label_all:
        return choice.labels
    labels = [name for name in choice.labels if rng.random() < FAMILIES[name].share]
    missing = [name for name in choice.labels if name not in labels]
    while len(labels) < 2 and missing:
        labels.append(missing.pop(int(rng.integers(len(missing)))))
    return tuple(name for name in choice.labels if name in labels)


@dataclass
class Field:
    """The part of the picture in which structures may lie: an ellipse without the occupied circles.

    Attributes:
        centre, half: centre (x, y) and half axes of the ellipse in pixels.
        occupied: (x, y, radius, firm) of each circle; a firm one may be touched but not covered.
    """

    centre: np.ndarray
    half: np.ndarray
    occupied: list[tuple[float, float, float, bool]] = field(default_factory=list)

    def find_centre(self, rng: Rng, radius: float, reach: float = 1.0, firm: bool = False) -> tuple[np.ndarray, float]:
        """Draw a free centre [2] for a circle and return it with the radius, which shrinks if space is short."""
        best, best_gap = self.centre, -np.inf
        for _ in range(24):
            room = np.maximum(self.half * reach - 0.8 * radius, 2.0)
            angle, distance = rng.uniform(0, 2 * np.pi), np.sqrt(rng.uniform(0, 1))
            position = self.centre + room * distance * np.array([np.cos(angle), np.sin(angle)])
            gaps = (
                np.hypot(position[0] - x, position[1] - y) - (1.12 if firm or other_firm else 0.9) * (radius + r)
                for x, y, r, other_firm in self.occupied
            )
            gap = min(gaps, default=np.inf)
            if gap > best_gap:
                best, best_gap = position, gap
            if gap >= 0:
                break
        if best_gap < 0:
            radius = max(radius * 0.66, radius + 0.6 * best_gap)
        self.occupied.append((float(best[0]), float(best[1]), radius, firm))
        return best, radius


class Placement:
    """Add random structures to a scene, one family at a time. `moving` scenes are clips, others are volumes."""

    def __init__(self, rng: Rng, scene: Scene, space: Field, moving: bool, drift: np.ndarray | None = None) -> None:
        """`drift` [T, 2] is the motion common to all structures, such as breathing or that of the probe."""
        self.rng, self.scene, self.space, self.moving = rng, scene, space, moving
        self.in_plane_share = 0.3 if moving else 0.15
        self.drift = np.zeros((scene.shape[0], 2)) if drift is None else drift

    def extent(self, shortest: float = 0.2, longest: float = 0.42, blunt: float = 2.3) -> np.ndarray:
        """Draw the relative radius [T] of one structure; it is usually 0 at both ends."""
        rng, frames = self.rng, self.scene.shape[0]
        if not self.moving:
            half = rng.uniform(shortest, longest) * frames
            margin = half + rng.uniform(0.5, 2.5) if rng.random() < 0.8 else 0.4 * half
            middle = frames / 2 if 2 * margin >= frames - 1 else rng.uniform(margin, frames - 1 - margin)
            return rise_and_fall(frames, middle, half, blunt * rng.uniform(0.85, 1.3))
        style = rng.random()
        ramp = rng.uniform(1.5, 4.0)
        if style < 0.3:
            return np.ones(frames)
        if style < 0.72:
            start = rng.uniform(0, 0.3) * frames if rng.random() < 0.75 else -9
            end = rng.uniform(0.7, 1.0) * frames if rng.random() < 0.75 or start < 0 else frames + 9
            return visits(frames, [(start, end)], ramp)
        leave = rng.uniform(0.3, 0.5) * frames
        back = leave + rng.uniform(2, 0.3 * frames)
        first, last = rng.choice([-9.0, 1.5]), rng.choice([frames + 9.0, frames - 2.0])
        return visits(frames, [(first, leave), (back, last)], ramp)

    def path(self, centre: np.ndarray, amplitude: float) -> np.ndarray:
        """Draw centres [T, 2] that wander around `centre` and follow the drift of the scene."""
        frames = self.scene.shape[0]
        sway = np.stack([wander(self.rng, frames, amplitude), wander(self.rng, frames, amplitude)], 1)
        return centre + sway + self.drift

    def size(self, low: float, high: float) -> float:
        """Draw a radius in pixels, log-uniformly."""
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high)))) * self.scene.scale

    def breathing(self, depth: float) -> np.ndarray:
        """Draw a slow change of size [T] around 1."""
        return 1 + wander(self.rng, self.scene.shape[0], depth, 1.5)

    def organ(self, label: str | None) -> int:
        """Add a large smooth blob."""
        rng = self.rng
        centre, radius = self.space.find_centre(rng, self.size(18, 36))
        unit = star(rng, self.scene.shape[0], rng.uniform(0.05, 0.22), rng.uniform(1.0, 1.7))
        outlines = place(unit, self.path(centre, 0.1 * radius), radius * self.extent(0.25, 0.46) * self.breathing(0.06))
        return self.scene.add(Structure("organ", outlines, label))

    def kidney(self, label: str | None) -> int:
        """Add a bean, mostly with a sinus of another tissue that has the same label."""
        rng, frames = self.rng, self.scene.shape[0]
        centre, radius = self.space.find_centre(rng, self.size(13, 21))
        unit = bean(rng, frames, rng.uniform(1.5, 2.0), rng.uniform(0.3, 0.6))
        angle = rng.uniform(0, 2 * np.pi) + wander(rng, frames, 0.3)
        size, path = radius * self.extent(0.24, 0.42), self.path(centre, 0.1 * radius)
        position = self.scene.add(Structure("kidney", place(turn(unit, angle), path, size), label))
        if rng.random() < 0.7:
            towards = turn(np.broadcast_to(np.array([[0.34, 0.0]]), (frames, 1, 2)), angle)[:, 0]
            inner = turn(star(rng, frames, 0.2, 1.0) * np.array([0.75, 1.05]), angle)
            profile = np.clip(size / radius - 0.55, 0, 1) * radius * rng.uniform(0.6, 0.9)
            self.scene.add(Structure("sinus", place(inner, path + towards * size[:, None], profile), label, position))
        return position

    def lesion(self, label: str | None, hosts: list[int]) -> int:
        """Add a small irregular blob, mostly inside or at the border of one of the `hosts`."""
        rng, frames = self.rng, self.scene.shape[0]
        radius = self.size(7, 14)
        unit = star(rng, frames, rng.uniform(0.15, 0.35), rng.uniform(1.0, 1.5), 1.3)
        host = hosts[int(rng.integers(len(hosts)))] if hosts and rng.random() < 0.65 else None
        if host is None:
            centre, radius = self.space.find_centre(rng, radius)
            path, extent = self.path(centre, 0.15 * radius), self.extent(0.14, 0.34, 2.0)
        else:
            path, extent, radius = self.inside_host(self.scene.structures[host], radius)
        kind = "polyp" if host is None else "lesion"
        return self.scene.add(Structure(kind, place(unit, path, radius * extent), label, host))

    def inside_host(self, host: Structure, radius: float) -> tuple[np.ndarray, np.ndarray, float]:
        """Draw path [T, 2], extent [T] and radius of a structure that moves with its host on some of its frames.

        It is smaller than its host and off its centre, so that the rest of the host is not a ring.
        """
        rng, frames = self.rng, self.scene.shape[0]
        present = np.array([bool(polygons) for polygons in host.outlines])
        middles = np.array([p[0].mean(0) if p else (np.nan, np.nan) for p in host.outlines])
        widths = np.array([np.sqrt(np.ptp(p[0], 0).prod()) / 2 if p else 0.0 for p in host.outlines])
        for axis in range(2):
            middles[:, axis] = np.interp(np.arange(frames), np.flatnonzero(present), middles[present, axis])
        radius = min(radius, max(0.5 * widths.max(), 6.0 * self.scene.scale))
        angle, share = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.0)
        offset = share * max(widths.max() - 0.6 * radius, 1.0) * np.array([np.cos(angle), np.sin(angle)])
        if self.moving:
            return middles + offset, self.extent() * np.clip(widths / (0.5 * widths.max()), 0, 1), radius
        middle = rng.choice(np.flatnonzero(widths > 0.6 * widths.max()))
        extent = rise_and_fall(frames, float(middle), max(rng.uniform(0.12, 0.3) * frames, 2.2), 2.0)
        return middles + offset + wander(rng, frames, 0.08 * radius)[:, None], extent, radius

    def vessel(self, label: str | None) -> int:
        """Add a tube that runs through the slices; some tubes branch, and some lie in the plane."""
        rng, frames = self.rng, self.scene.shape[0]
        radius = self.size(7, 10.5)
        extent = self.extent(0.3, 0.6, 5.0) * self.breathing(0.08)
        centre, radius = self.space.find_centre(rng, radius)
        if rng.random() < self.in_plane_share:
            return self.scene.add(Structure("vessel", self.in_plane(centre, radius, extent), label))
        path = self.path(centre, radius * rng.uniform(0.3, 1.3))
        unit = star(rng, frames, 0.05, rng.uniform(1.0, 1.4))
        outlines = place(unit, path, radius * extent)
        if not self.moving and rng.random() < 0.4:
            fork = int(rng.integers(frames // 3, 2 * frames // 3))
            apart = np.clip(np.arange(frames) - fork, 0, None)[:, None] * rng.uniform(-1, 1, 2) * 0.25 * radius
            branch = place(unit, path + apart, radius * extent * 0.85)
            for frame in range(fork, frames):
                outlines[frame] = outlines[frame] + branch[frame]
        return self.scene.add(Structure("vessel", outlines, label))

    def in_plane(self, centre: np.ndarray, radius: float, extent: np.ndarray) -> Outlines:
        """Draw a tube in the plane: a band whose width on each frame is the chord of the tube."""
        rng = self.rng
        angle = rng.uniform(0, np.pi)
        reach = radius * rng.uniform(3, 5) * np.array([np.cos(angle), np.sin(angle)])
        line = curve(rng, centre - reach, centre + reach, 1.5 * radius)
        along = np.linspace(0, 1, len(line))
        ends = np.minimum(1.0, np.sqrt(np.minimum(along, 1 - along) * 9 + 0.05))
        taper = radius * np.linspace(0.9, rng.uniform(0.5, 0.9), len(line)) * ends
        if not self.moving:
            frames = len(extent)
            half = rng.uniform(2.2, 5.0)
            extent = rise_and_fall(frames, rng.uniform(half, frames - 1 - half), half, 2.5)
        shift = self.path(np.zeros(2), 0.3 * radius)
        return [
            [strip(line + shift[frame], taper * size)] if radius * size > 2.2 else []
            for frame, size in enumerate(extent)
        ]

    def wall(self, label: str | None) -> int:
        """Add a ring of uneven thickness around a cavity, which may beat in clips. Only the ring is labelled."""
        rng, frames = self.rng, self.scene.shape[0]
        centre, radius = self.space.find_centre(rng, self.size(20, 33), 0.95, firm=True)
        radius = max(radius, 15 * self.scene.scale)
        outer = star(rng, frames, rng.uniform(0.02, 0.12), rng.uniform(1.0, 1.4), 0.7)
        angles = np.linspace(0, 2 * np.pi, outer.shape[1], endpoint=False)
        thickness = rng.uniform(0.2, 0.32) * (1 + rng.uniform(0, 0.3) * np.cos(angles - rng.uniform(0, 2 * np.pi)))
        extent = self.extent(0.28, 0.46, 4.0)
        beat = np.zeros(frames)
        if self.moving and rng.random() < 0.7:
            beat = 0.5 + 0.5 * np.sin(2 * np.pi * np.arange(frames) / rng.uniform(6, 12) + rng.uniform(0, 6))
        inner = outer * (1 - np.maximum(thickness, 0.16)[None] * (1 + 0.3 * beat)[:, None])[..., None]
        path, size = self.path(centre, 0.08 * radius), radius * extent * (1 - 0.1 * beat)
        size = np.where(extent > 0.45, size, 0.0)
        position = self.scene.add(Structure("wall", place(outer, path, size), label))
        self.scene.add(Structure("cavity", place(inner, path, size), None, position))
        return position

    def clutter(self) -> int:
        """Add an unlabelled blob, which may be as large and as bright as a labelled one."""
        rng, frames = self.rng, self.scene.shape[0]
        centre, radius = self.space.find_centre(rng, self.size(5, 17), 1.05)
        unit = star(rng, frames, rng.uniform(0.05, 0.3), rng.uniform(1.0, 2.2))
        size = radius * self.extent(0.2, 0.7)
        return self.scene.add(Structure("clutter", place(unit, self.path(centre, 0.2 * radius), size)))

    def populate(self, choice: Choice, labelled: tuple[str, ...], clutter: int) -> None:
        """Add labelled families, unlabelled structures of the same families, and clutter; then sort them by layer."""
        rng = self.rng
        hosts: list[int] = []
        for name in ("wall", "organ", "kidney", "vessel"):
            is_labelled = name in labelled
            is_allowed = name in choice.labels or name in choice.clutter
            add_unlabelled = is_allowed and rng.random() < (0.3 if name != "wall" or not is_labelled else 0.0)
            for label in [name] * is_labelled + [None] * add_unlabelled:
                index = getattr(self, name)(label)
                hosts += [index] if name in ("organ", "kidney") and label else []
        if ("lesion" in choice.labels or "lesion" in choice.clutter) and rng.random() < 0.3:
            self.lesion(None, [])
        if "lesion" in labelled:
            self.lesion("lesion", hosts)
        for _ in range(clutter):
            self.clutter()
        self.scene.sort()
