"""The prompts of evaluation: which frames are prompted, with which prompts, and with which negative points.

Each rule is one small function that a protocol refers to by name. To add one, write a function from `ObjectTrack` to
frame indices with `@slice_rule` above it, from `ObjectView` to prompts with `@prompt_rule()`, or from `ObjectView` to
points with `@negative_rule`. A prompt rule with `predict_separately` makes several prompts; each is predicted as a
separate object, and the masks are joined afterwards. All rules are deterministic for a fixed seed.

Legend: T slices or frames, P points, H and W pixels. Coordinates are (x, y) indices of pixel centres on the mask's own
grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage

from medsam2.plugins import register
from medsam2.prompts.initial import longest_diameter
from medsam2.prompts.kinds import NEGATIVE, POSITIVE

ALL_NEIGHBOURS = np.ones((3, 3), dtype=bool)
FAR_POINT_CANDIDATES = 64  # uniform draws per point, of which the rule `far` takes the farthest


# -------------------------------------------------------------------------------------------------------- frames


@dataclass(frozen=True, eq=False)
class ObjectTrack:
    """The frames that show one object of a case.

    Attributes:
        areas: int [T], the object's number of pixels on each frame.
        entries: returns bool [T], the frames on which any object of the case appears (`mark_entries`).
        step: every step-th frame is prompted, by rules that use it.
    """

    areas: np.ndarray
    entries: Callable[[], np.ndarray]
    step: int = 1

    @property
    def frames(self) -> np.ndarray:
        """Indices of the frames that show the object, ascending."""
        return np.flatnonzero(self.areas)


SliceRule = Callable[[ObjectTrack], np.ndarray]
SLICE_RULES: dict[str, SliceRule] = {}


def slice_rule(function: SliceRule) -> SliceRule:
    """Register a function that chooses frames under its name (a decorator).

    Raises:
        RuntimeError: the name is taken.
    """
    return register(SLICE_RULES, function.__name__, function, "slice rules")


def pick_frames(track: ObjectTrack, name: str) -> tuple[int, ...]:
    """Return the frames that the rule `name` prompts, in temporal order.

    Raises:
        ValueError: the object has no pixel on any frame.
    """
    if not track.areas.any():
        raise ValueError("the object is empty on every frame: there is nothing to prompt")
    return tuple(sorted(int(frame) for frame in SLICE_RULES[name](track)))


def mark_entries(present: np.ndarray) -> np.ndarray:
    """Mark the frames where an object appears: present bool [T] -> bool [T], False if it was on the frame before."""
    return np.asarray(present & ~np.concatenate([[False], present[:-1]]))


@slice_rule
def first(track: ObjectTrack) -> np.ndarray:
    """The first frame that shows the object."""
    return track.frames[:1]


@slice_rule
def last(track: ObjectTrack) -> np.ndarray:
    """The last frame that shows the object."""
    return track.frames[-1:]


# Axial volumes are stored feet first, so that the first frame is the caudal end and the last one the cranial end.
SLICE_RULES |= {"caudal": first, "cranial": last}


@slice_rule
def middle(track: ObjectTrack) -> np.ndarray:
    """The middle of the list of frames that show the object."""
    return track.frames[[len(track.frames) // 2]]


@slice_rule
def largest(track: ObjectTrack) -> np.ndarray:
    """The frame with the largest area, the earliest of equals."""
    return np.asarray([np.argmax(track.areas)])


@slice_rule
def spread(track: ObjectTrack) -> np.ndarray:
    """Three of the n frames, n // 4 apart, without the first frame (Dong et al.); all n if there are fewer than 4."""
    step = len(track.frames) // 4
    return track.frames if step == 0 else track.frames[::step][1:4]


@slice_rule
def both_ends(track: ObjectTrack) -> np.ndarray:
    """The first and the last frame that show the object."""
    return np.unique(track.frames[[0, -1]])


@slice_rule
def every(track: ObjectTrack) -> np.ndarray:
    """Every `step`-th frame counted from the object's first frame, if it shows the object."""
    start = track.frames[0]
    return track.frames[(track.frames - start) % track.step == 0]


@slice_rule
def enters(track: ObjectTrack) -> np.ndarray:
    """Each frame on which the object appears: for the first time, or again after an absence."""
    return np.flatnonzero(mark_entries(track.areas > 0))


@slice_rule
def any_enters(track: ObjectTrack) -> np.ndarray:
    """The object's first frame, and each frame that shows it and on which any object of the case appears."""
    return np.union1d(track.frames[:1], np.flatnonzero(track.entries() & (track.areas > 0)))


# ------------------------------------------------------------------------------------------- prompts of a frame


@dataclass(frozen=True, eq=False)
class ObjectView:
    """One object on one frame.

    Attributes:
        mask: bool [H, W], not empty. others: masks [H, W] of the other objects on this frame.
        number: of boxes or points, for rules that make several (`ProtocolSettings`).
        seed: for random points; differs between objects and frames.
    """

    mask: np.ndarray
    others: tuple[np.ndarray, ...] = ()
    number: int = 3
    seed: tuple[int, ...] = (0,)


@dataclass(frozen=True, eq=False)
class ObjectPrompt:
    """The prompt of one object on one frame: a box, points, both, or a mask.

    Attributes:
        box: (x0, y0, x1, y1). points: float32 [P, 2]. labels: int32 [P], 1 (positive) or 0. mask: bool [H, W].
    """

    box: tuple[float, float, float, float] | None = None
    points: np.ndarray | None = None
    labels: np.ndarray | None = None
    mask: np.ndarray | None = None

    def with_negatives(self, points: np.ndarray) -> ObjectPrompt:
        """Return this prompt with negative points float32 [P, 2] after its own."""
        if len(points) == 0:
            return self
        labels = np.full(len(points), NEGATIVE, np.int32)
        if self.points is None or self.labels is None:
            return replace(self, points=points, labels=labels)
        return replace(self, points=np.concatenate([self.points, points]), labels=np.append(self.labels, labels))


PromptFunction = Callable[[ObjectView], list[ObjectPrompt]]


@dataclass(frozen=True)
class PromptRule:
    """A rule that makes the prompts of an object on one frame.

    Attributes:
        make: returns the prompts; more than one only if `predict_separately`.
        predict_separately: whether each prompt is predicted as a separate object and the masks are joined.
        trained_kinds: kinds of `PromptSettings.kinds`. A model trained with any of them knows this prompt.
    """

    make: PromptFunction
    predict_separately: bool = False
    trained_kinds: tuple[str, ...] = ()


NegativeRule = Callable[[ObjectView, int], np.ndarray]
PROMPT_RULES: dict[str, PromptRule] = {}
NEGATIVE_RULES: dict[str, NegativeRule] = {}


def prompt_rule(*trained_kinds: str, predict_separately: bool = False) -> Callable[[PromptFunction], PromptFunction]:
    """Register a function that makes prompts under its name (a decorator); arguments as in `PromptRule`.

    Raises:
        RuntimeError: the name is taken.
    """

    def decorate(function: PromptFunction) -> PromptFunction:
        rule = PromptRule(function, predict_separately, trained_kinds)
        return register(PROMPT_RULES, function.__name__, rule, "prompt rules").make

    return decorate


def negative_rule(function: NegativeRule) -> NegativeRule:
    """Register a function that places negative points under its name (a decorator).

    Raises:
        RuntimeError: the name is taken.
    """
    return register(NEGATIVE_RULES, function.__name__, function, "rules for negative points")


def _positive_points(points: np.ndarray) -> ObjectPrompt:
    return ObjectPrompt(points=points, labels=np.full(len(points), POSITIVE, np.int32))


@prompt_rule("box", "box_click")
def box(view: ObjectView) -> list[ObjectPrompt]:
    """The tight box around the whole object."""
    return [ObjectPrompt(box=tight_box(view.mask))]


@prompt_rule("box", "box_click", predict_separately=True)
def boxes(view: ObjectView) -> list[ObjectPrompt]:
    """The tight box around each of the `number` largest components; predicted separately and joined."""
    return [ObjectPrompt(box=tight_box(part)) for part in components_by_size(view.mask)[: view.number]]


@prompt_rule("mask")
def mask(view: ObjectView) -> list[ObjectPrompt]:
    """The ground-truth mask."""
    return [ObjectPrompt(mask=view.mask)]


@prompt_rule("click", "points", "box_click")
def click(view: ObjectView) -> list[ObjectPrompt]:
    """The deepest point of the largest component."""
    return [_positive_points(component_points(view.mask, 1))]


@prompt_rule("click", "points", "box_click")
def clicks(view: ObjectView) -> list[ObjectPrompt]:
    """The deepest point of each of the `number` largest components."""
    return [_positive_points(component_points(view.mask, view.number))]


@prompt_rule("click", "points", "box_click")
def deepest(view: ObjectView) -> list[ObjectPrompt]:
    """The deepest point of the object in any component: the first correction click if nothing was predicted."""
    return [_positive_points(np.asarray([deepest_point(view.mask)], np.float32))]


@prompt_rule("points")
def scattered(view: ObjectView) -> list[ObjectPrompt]:
    """`number` points: the pixel nearest to the centroid, and random pixels of the object without repetition."""
    rows, columns = np.nonzero(view.mask)
    centre = int(np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2))
    rest = np.delete(np.arange(len(rows)), centre)
    others = np.random.default_rng(view.seed).choice(rest, min(view.number - 1, len(rest)), replace=False)
    indices = np.concatenate([[centre], others]).astype(int)
    return [_positive_points(np.stack([columns[indices], rows[indices]], 1).astype(np.float32))]


@prompt_rule("box_click")
def box_click(view: ObjectView) -> list[ObjectPrompt]:
    """The tight box and the deepest point of the largest component."""
    return [replace(_positive_points(component_points(view.mask, 1)), box=tight_box(view.mask))]


@prompt_rule("recist", "points")
def recist(view: ObjectView) -> list[ObjectPrompt]:
    """The ends of the longest diameter (RECIST 1.1), and its middle if that lies on the object."""
    ends = _diameter(view.mask)
    x, y = np.rint(ends.mean(0)).astype(int)
    inside = bool(view.mask[y, x])
    return [_positive_points(np.concatenate([ends, [[x, y]]]).astype(np.float32) if inside else ends)]


@prompt_rule("recist_box", "box")
def recist_box(view: ObjectView) -> list[ObjectPrompt]:
    """The square centred on the longest diameter, with its length as side, clipped to the picture."""
    ends = _diameter(view.mask)
    reach = float(np.linalg.norm(ends[1] - ends[0])) / 2
    x, y = ends.mean(0).tolist()
    height, width = view.mask.shape
    x0, y0, x1, y1 = max(x - reach, 0.0), max(y - reach, 0.0), min(x + reach, width - 1.0), min(y + reach, height - 1.0)
    return [ObjectPrompt(box=(x0, y0, x1, y1))]


# ----------------------------------------------------------------------------------------------------- negatives


@negative_rule
def far(view: ObjectView, number: int) -> np.ndarray:
    """Random points far from the object and from each other (Sengupta et al., arXiv 2408.04212).

    Each point is the one of 64 uniform draws that is farthest from the object and from the points before it.
    """
    rows, columns = np.nonzero(~view.mask)
    if len(rows) == 0:
        return np.zeros((0, 2), np.float32)
    distance = ndimage.distance_transform_edt(~view.mask)[rows, columns]
    random = np.random.default_rng(view.seed)
    indices: list[int] = []
    for _ in range(min(number, len(rows))):
        candidates = random.choice(len(rows), min(FAR_POINT_CANDIDATES, len(rows)), replace=False)
        farthest = int(candidates[np.argmax(distance[candidates])])
        indices.append(farthest)
        distance = np.minimum(distance, np.hypot(rows - rows[farthest], columns - columns[farthest]))
    return np.stack([columns[indices], rows[indices]], 1).astype(np.float32)


@negative_rule
def near(view: ObjectView, number: int) -> np.ndarray:
    """Random points in the band 3 to 8 pixels away from the object; fewer if the band has fewer pixels."""
    distance = ndimage.distance_transform_edt(~view.mask)
    rows, columns = np.nonzero((distance >= 3) & (distance <= 8))
    random = np.random.default_rng(view.seed)
    indices = random.choice(len(rows), min(number, len(rows)), replace=False) if len(rows) else np.zeros(0, int)
    return np.stack([columns[indices], rows[indices]], 1).astype(np.float32)


@negative_rule
def others(view: ObjectView, number: int) -> np.ndarray:
    """Clicks on the other objects of this frame, largest object first (Lou et al., arXiv 2408.01648)."""
    masks = [other & ~view.mask for other in sorted(view.others, key=np.count_nonzero, reverse=True)]
    points = [component_points(mask, 1) for mask in masks if mask.any()]
    return np.concatenate([np.zeros((0, 2), np.float32), *points[:number]])


# ------------------------------------------------------------------------------------------------------ geometry


def tight_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Return (x0, y0, x1, y1) of a bool mask [H, W]: the centres of its outermost pixels, as in SAM 2's training."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1]), float(rows[-1])


def deepest_point(mask: np.ndarray) -> tuple[float, float]:
    """Return (x, y) of the pixel of a bool mask [H, W] that is farthest from its background.

    The Euclidean distance transform treats the picture's border as background. Among equally deep pixels, the nearest
    to the mask's centroid is taken, so that a rectangle is clicked in its middle.
    """
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    rows, columns = np.nonzero(depth >= depth.max() - 1e-6)
    centre = ndimage.center_of_mass(mask)
    best = np.argmin((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2)
    return float(columns[best]), float(rows[best])


def components_by_size(mask: np.ndarray) -> list[np.ndarray]:
    """Return the 8-connected components of a bool mask [H, W] as masks [H, W], largest first."""
    labels, count = ndimage.label(mask, structure=ALL_NEIGHBOURS)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return [labels == value + 1 for value in np.argsort(-sizes, kind="stable")]


def component_points(mask: np.ndarray, number: int = 1) -> np.ndarray:
    """Return the deepest point of each of the `number` largest components of a bool mask [H, W]: float32 [P, 2]."""
    points = [deepest_point(component) for component in components_by_size(mask)[:number]]
    return np.asarray(points, dtype=np.float32)


def _diameter(mask: np.ndarray) -> np.ndarray:
    """Return both ends of the longest diameter of a bool mask [H, W]: float32 [2, 2]."""
    side = max(mask.shape)
    square = np.zeros((1, side, side), bool)
    square[0, : mask.shape[0], : mask.shape[1]] = mask
    return np.asarray(longest_diameter(torch.from_numpy(square))[0].numpy(), np.float32)
