"""A scene: where structures lie, how they change from frame to frame, and which of them carry a label.

A look (ct.py, mr.py, us.py, endoscopy.py) gives every region its intensity; a scene knows geometry alone.
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
"""Sizes below are in pixels of a picture of this mean side; others are scaled."""

LAYERS = {"clutter": 1, "organ": 2, "kidney": 3, "sinus": 3, "wall": 4, "cavity": 4, "vessel": 5}
LAYERS |= {"lesion": 6, "polyp": 6}
"""Which structures cover which; anatomy around them (body, bones) is 0, in the order in which it was added."""


@dataclass(frozen=True, eq=False)
class Structure:
    """One region of the picture.

    Attributes:
        kind: tissue name, for the look.
        outlines: its polygons on each frame.
        label: the family that its pixels carry, or None.
        host: position (in the scene) of the structure in which it lies, or None for the surroundings.
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
        """Append a structure; its position is its region number minus one."""
        self.structures.append(structure)
        return len(self.structures) - 1

    def sort(self) -> None:
        """Bring the structures into the order of their layers; hosts are renumbered."""
        order = sorted(range(len(self.structures)), key=lambda position: LAYERS.get(self.structures[position].kind, 0))
        new = {old: position for position, old in enumerate(order)}
        moved = [self.structures[old] for old in order]
        self.structures[:] = [replace(s, host=None if s.host is None else new[s.host]) for s in moved]

    @property
    def scale(self) -> float:
        """Pixels of this picture for one pixel of the reference size."""
        return float(np.sqrt(self.shape[1] * self.shape[2])) / REFERENCE_SIDE

    def regions(self) -> np.ndarray:
        """uint8 [T, H, W]: 0 where nothing was painted, otherwise position + 1 of the uppermost structure."""
        canvas = np.zeros(self.shape, np.uint8)
        for position, structure in enumerate(self.structures, start=1):
            for frame, polygons in enumerate(structure.outlines):
                fill(canvas[frame], polygons, position)
        return canvas

    def labels(self, regions: np.ndarray, ids: dict[str, int]) -> np.ndarray:
        """uint8 [T, H, W] label values of a region map."""
        table = np.zeros(len(self.structures) + 1, np.uint8)
        for position, structure in enumerate(self.structures, start=1):
            table[position] = ids.get(structure.label or "", 0)
        return table[regions]


def pick_labels(rng: Rng, choice: Choice) -> tuple[str, ...]:
    """The families that one case labels: all of an explicit choice, otherwise a random part (two where possible)."""
    if choice.every:
        return choice.labels
    drawn = [name for name in choice.labels if rng.random() < FAMILIES[name].share]
    missing = [name for name in choice.labels if name not in drawn]
    while len(drawn) < 2 and missing:
        drawn.append(missing.pop(int(rng.integers(len(missing)))))
    return tuple(name for name in choice.labels if name in drawn)


@dataclass
class Field:
    """The part of the picture in which structures may lie: an ellipse, and the circles already taken.

    Attributes:
        centre, half: ellipse (x, y) and its half axes in pixels.
        taken: (x, y, radius, firm); a firm one may be touched but not covered.
    """

    centre: np.ndarray
    half: np.ndarray
    taken: list[tuple[float, float, float, bool]] = field(default_factory=list)

    def find(self, rng: Rng, radius: float, reach: float = 1.0, firm: bool = False) -> tuple[np.ndarray, float]:
        """A free place for about `radius`: returns centre [2] and the radius, smaller where space is short."""
        best, best_gap = self.centre, -np.inf
        for _ in range(24):
            room = np.maximum(self.half * reach - 0.8 * radius, 2.0)
            angle, distance = rng.uniform(0, 2 * np.pi), np.sqrt(rng.uniform(0, 1))
            spot = self.centre + room * distance * np.array([np.cos(angle), np.sin(angle)])
            gap = min(
                (np.hypot(spot[0] - x, spot[1] - y) - (1.12 if firm or solid else 0.9) * (radius + r))
                for x, y, r, solid in [*self.taken, (1e4, 1e4, 0.0, False)]
            )
            if gap > best_gap:
                best, best_gap = spot, gap
            if gap >= 0:
                break
        if best_gap < 0:
            radius = max(radius * 0.66, radius + 0.6 * best_gap)
        self.taken.append((float(best[0]), float(best[1]), radius, firm))
        return best, radius


class Placement:
    """Draws structures into a scene one family at a time. `moving` scenes are clips, others volumes."""

    def __init__(self, rng: Rng, scene: Scene, space: Field, moving: bool, drift: np.ndarray | None = None) -> None:
        """`drift` [T, 2] is a motion that all structures share (breathing, the hand that holds the probe)."""
        self.rng, self.scene, self.space, self.moving = rng, scene, space, moving
        self.in_plane_share = 0.3 if moving else 0.15
        self.drift = np.zeros((scene.shape[0], 2)) if drift is None else drift

    def extent(self, shortest: float = 0.2, longest: float = 0.42, blunt: float = 2.3) -> np.ndarray:
        """Relative radius [T] of one structure; empty at both ends in most cases."""
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
        """Centres [T, 2] that wander around `centre` and share the scene's drift."""
        frames = self.scene.shape[0]
        sway = np.stack([wander(self.rng, frames, amplitude), wander(self.rng, frames, amplitude)], 1)
        return centre + sway + self.drift

    def size(self, low: float, high: float) -> float:
        """A radius in pixels, drawn evenly in its logarithm."""
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high)))) * self.scene.scale

    def breathing(self, depth: float) -> np.ndarray:
        """Slow change of size [T]."""
        return 1 + wander(self.rng, self.scene.shape[0], depth, 1.5)

    def organ(self, label: str | None) -> int:
        """A large smooth blob."""
        rng = self.rng
        centre, radius = self.space.find(rng, self.size(18, 36))
        unit = star(rng, self.scene.shape[0], rng.uniform(0.05, 0.22), rng.uniform(1.0, 1.7))
        outlines = place(unit, self.path(centre, 0.1 * radius), radius * self.extent(0.25, 0.46) * self.breathing(0.06))
        return self.scene.add(Structure("organ", outlines, label))

    def kidney(self, label: str | None) -> int:
        """A bean with a sinus of another tissue, which belongs to it."""
        rng, frames = self.rng, self.scene.shape[0]
        centre, radius = self.space.find(rng, self.size(13, 21))
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
        """A small irregular blob, most often inside or at the border of one of the `hosts`."""
        rng, frames = self.rng, self.scene.shape[0]
        radius = self.size(7, 14)
        unit = star(rng, frames, rng.uniform(0.15, 0.35), rng.uniform(1.0, 1.5), 1.3)
        host = hosts[int(rng.integers(len(hosts)))] if hosts and rng.random() < 0.65 else None
        if host is None:
            centre, radius = self.space.find(rng, radius)
            path, extent = self.path(centre, 0.15 * radius), self.extent(0.14, 0.34, 2.0)
        else:
            path, extent, radius = self.within(self.scene.structures[host], radius)
        kind = "polyp" if host is None else "lesion"
        return self.scene.add(Structure(kind, place(unit, path, radius * extent), label, host))

    def within(self, host: Structure, radius: float) -> tuple[np.ndarray, np.ndarray, float]:
        """Path [T, 2], extent [T] and radius of something that moves with its host and shares some of its frames.

        It is well smaller than its host and off its middle, so that what remains of the host is no ring.
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
        """A tube that runs through the slices, oblique where its path is steep; some branch, some run in the plane."""
        rng, frames = self.rng, self.scene.shape[0]
        radius = self.size(7, 10.5)
        extent = self.extent(0.3, 0.6, 5.0) * self.breathing(0.08)
        centre, radius = self.space.find(rng, radius)
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
        """A tube that lies in the picture: a band whose width is its chord at each frame."""
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
        """A ring of moderate, uneven thickness around a cavity; beats in clips. The label is the ring alone."""
        rng, frames = self.rng, self.scene.shape[0]
        centre, radius = self.space.find(rng, self.size(20, 33), 0.95, firm=True)
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
        """An unlabelled blob, which may be as large and as bright as a labelled one."""
        rng, frames = self.rng, self.scene.shape[0]
        centre, radius = self.space.find(rng, self.size(5, 17), 1.05)
        unit = star(rng, frames, rng.uniform(0.05, 0.3), rng.uniform(1.0, 2.2))
        size = radius * self.extent(0.2, 0.7)
        return self.scene.add(Structure("clutter", place(unit, self.path(centre, 0.2 * radius), size)))

    def populate(self, choice: Choice, labelled: tuple[str, ...], clutter: int) -> None:
        """Place labelled families, unlabelled look-alikes of them, and clutter; then order them by layer."""
        rng = self.rng
        hosts: list[int] = []
        for name in ("wall", "organ", "kidney", "vessel"):
            marked = name in labelled
            known = name in choice.labels or name in choice.clutter
            spare = known and rng.random() < (0.3 if name != "wall" or not marked else 0.0)
            for label in [name] * marked + [None] * spare:
                position = getattr(self, name)(label)
                hosts += [position] if name in ("organ", "kidney") and label else []
        if ("lesion" in choice.labels or "lesion" in choice.clutter) and rng.random() < 0.3:
            self.lesion(None, [])
        if "lesion" in labelled:
            self.lesion("lesion", hosts)
        for _ in range(clutter):
            self.clutter()
        self.scene.sort()
