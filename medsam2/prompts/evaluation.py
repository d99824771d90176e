"""What evaluation prompts: the frames of an object, what is said of it there, and negative points beside it.

Each rule is one small function, registered by its name, which any protocol can then name. To add one, write a function
from `Shown` to frames with `@slice_rule` above it, from `Look` to prompts with `@prompt_rule()`, or from `Look` to
points with `@negative_rule`. A prompt rule marked `apart` gives parts that are predicted as if each were an object of
its own and joined afterwards. All are deterministic, given the seed.

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
DRAWS = 64  # candidates among which a far point is chosen


# -------------------------------------------------------------------------------------------------------- frames


@dataclass(frozen=True, eq=False)
class Shown:
    """Where an object shows.

    Attributes:
        areas: int [T], its pixels on each frame; positive somewhere.
        entries: gives bool [T], the frames on which any object of the case comes into view (0 too, if one is there).
        step: the k of rules that take every k-th frame.
    """

    areas: np.ndarray
    entries: Callable[[], np.ndarray]
    step: int = 1

    @property
    def frames(self) -> np.ndarray:
        """The frames that show the object, in order."""
        return np.flatnonzero(self.areas)


SliceRule = Callable[[Shown], np.ndarray]
SLICE_RULES: dict[str, SliceRule] = {}


def slice_rule(function: SliceRule) -> SliceRule:
    """Make a function that chooses frames known under its own name.

    Raises:
        RuntimeError: the name is taken.
    """
    return register(SLICE_RULES, function.__name__, function, "slice rules")


def choose_frames(shown: Shown, name: str) -> tuple[int, ...]:
    """The frames to prompt by the rule `name`, in order of time.

    Raises:
        ValueError: the object is nowhere.
    """
    if not shown.areas.any():
        raise ValueError("the object is empty on every frame: there is nothing to prompt")
    return tuple(sorted(int(frame) for frame in SLICE_RULES[name](shown)))


def comes_into_view(present: np.ndarray) -> np.ndarray:
    """The frames bool [T] on which something is there that was not on the frame before."""
    return np.asarray(present & ~np.concatenate([[False], present[:-1]]))


@slice_rule
def first(shown: Shown) -> np.ndarray:
    """The first frame that shows the object."""
    return shown.frames[:1]


@slice_rule
def last(shown: Shown) -> np.ndarray:
    """The last frame that shows the object."""
    return shown.frames[-1:]


# axial volumes are read feet first: the ends of the object nearest to the feet and to the head
SLICE_RULES |= {"caudal": first, "cranial": last}


@slice_rule
def middle(shown: Shown) -> np.ndarray:
    """The middle of the list of frames that show the object."""
    return shown.frames[[len(shown.frames) // 2]]


@slice_rule
def largest(shown: Shown) -> np.ndarray:
    """The frame with the largest area, the earliest of equals."""
    return np.asarray([np.argmax(shown.areas)])


@slice_rule
def spread(shown: Shown) -> np.ndarray:
    """Every n // 4-th of the n frames, the first dropped, three kept (Dong et al.); all where n is below four."""
    step = len(shown.frames) // 4
    return shown.frames if step == 0 else shown.frames[::step][1:4]


@slice_rule
def both_ends(shown: Shown) -> np.ndarray:
    """The first and the last frame that show the object."""
    return np.unique(shown.frames[[0, -1]])


@slice_rule
def every(shown: Shown) -> np.ndarray:
    """Every k-th frame of the clip counted from the first one with the object, where it is seen then."""
    start = shown.frames[0]
    return shown.frames[(shown.frames - start) % shown.step == 0]


@slice_rule
def enters(shown: Shown) -> np.ndarray:
    """Each frame on which the object comes into view, the first time and whenever it had been away."""
    return np.flatnonzero(comes_into_view(shown.areas > 0))


@slice_rule
def any_enters(shown: Shown) -> np.ndarray:
    """The object's first frame, and each later one that shows it when any object of the scene comes into view."""
    again = np.flatnonzero(shown.entries() & (shown.areas > 0))
    return np.union1d(shown.frames[:1], again)


# ------------------------------------------------------------------------------------------- prompts of a frame


@dataclass(frozen=True, eq=False)
class Look:
    """One object on one frame.

    Attributes:
        mask: bool [H, W], not empty. others: the masks of the other objects that this frame shows.
        number: see `ProtocolSettings`. seed: of what is drawn, different for each object and frame.
    """

    mask: np.ndarray
    others: tuple[np.ndarray, ...] = ()
    number: int = 3
    seed: tuple[int, ...] = (0,)


@dataclass(frozen=True, eq=False)
class Given:
    """A prompt: a box (x0, y0, x1, y1) and or points float32 [P, 2] with labels int32 [P] (1, 0), or a mask [H, W]."""

    box: tuple[float, float, float, float] | None = None
    points: np.ndarray | None = None
    labels: np.ndarray | None = None
    mask: np.ndarray | None = None

    def with_negatives(self, points: np.ndarray) -> Given:
        """This prompt and negative points float32 [P, 2]."""
        if len(points) == 0:
            return self
        labels = np.full(len(points), NEGATIVE, np.int32)
        if self.points is None or self.labels is None:
            return replace(self, points=points, labels=labels)
        return replace(self, points=np.concatenate([self.points, points]), labels=np.append(self.labels, labels))


PromptFunction = Callable[[Look], list[Given]]


@dataclass(frozen=True)
class KnownPrompt:
    """A rule and what has to be known about it.

    Attributes:
        give: the prompts of a frame; several only if `apart`.
        apart: whether they are predicted one by one and joined.
        trained_as: the kinds of `PromptSettings`, any of which a model must have been trained with.
    """

    give: PromptFunction
    apart: bool = False
    trained_as: tuple[str, ...] = ()


NegativeRule = Callable[[Look, int], np.ndarray]
PROMPT_RULES: dict[str, KnownPrompt] = {}
NEGATIVE_RULES: dict[str, NegativeRule] = {}


def prompt_rule(*trained_as: str, apart: bool = False) -> Callable[[PromptFunction], PromptFunction]:
    """Make a function known under its own name.

    Raises:
        RuntimeError: the name is taken.
    """

    def enter(function: PromptFunction) -> PromptFunction:
        known = KnownPrompt(function, apart, trained_as)
        return register(PROMPT_RULES, function.__name__, known, "prompt rules").give

    return enter


def negative_rule(function: NegativeRule) -> NegativeRule:
    """Make a function that places negative points known under its own name.

    Raises:
        RuntimeError: the name is taken.
    """
    return register(NEGATIVE_RULES, function.__name__, function, "rules for negative points")


def _positive(points: np.ndarray) -> Given:
    return Given(points=points, labels=np.full(len(points), POSITIVE, np.int32))


@prompt_rule("box", "box_click")
def box(look: Look) -> list[Given]:
    """The tight box around the whole object."""
    return [Given(box=tight_box(look.mask))]


@prompt_rule("box", "box_click", apart=True)
def boxes(look: Look) -> list[Given]:
    """A tight box around each of the `number` largest components, predicted apart and joined."""
    return [Given(box=tight_box(part)) for part in components_by_size(look.mask)[: look.number]]


@prompt_rule("mask")
def mask(look: Look) -> list[Given]:
    """The ground truth."""
    return [Given(mask=look.mask)]


@prompt_rule("click", "points", "box_click")
def click(look: Look) -> list[Given]:
    """One point, the deepest of the largest component."""
    return [_positive(component_points(look.mask, 1))]


@prompt_rule("click", "points", "box_click")
def clicks(look: Look) -> list[Given]:
    """The deepest point of each of the `number` largest components."""
    return [_positive(component_points(look.mask, look.number))]


@prompt_rule("click", "points", "box_click")
def deepest(look: Look) -> list[Given]:
    """The deepest point of the object, whichever component it is in: where a correction of nothing would click."""
    return [_positive(np.asarray([deepest_point(look.mask)], np.float32))]


@prompt_rule("points")
def scattered(look: Look) -> list[Given]:
    """`number` points: the pixel nearest to the centroid, the others drawn inside without repetition."""
    return [_positive(scattered_points(look.mask, look.number, look.seed))]


@prompt_rule("box_click")
def box_click(look: Look) -> list[Given]:
    """The tight box and the deepest point of the largest component."""
    return [replace(_positive(component_points(look.mask, 1)), box=tight_box(look.mask))]


@prompt_rule("recist", "points")
def recist(look: Look) -> list[Given]:
    """The ends of the longest diameter and its middle, where that is on the object (RECIST 1.1)."""
    ends = _diameter(look.mask)
    x, y = np.rint(ends.mean(0)).astype(int)
    inside = bool(look.mask[y, x])
    return [_positive(np.concatenate([ends, [[x, y]]]).astype(np.float32) if inside else ends)]


@prompt_rule("recist_box", "box")
def recist_box(look: Look) -> list[Given]:
    """The square around the longest diameter, its side the diameter's length, cut at the picture's border."""
    ends = _diameter(look.mask)
    reach = float(np.linalg.norm(ends[1] - ends[0])) / 2
    x, y = ends.mean(0).tolist()
    height, width = look.mask.shape
    x0, y0, x1, y1 = max(x - reach, 0.0), max(y - reach, 0.0), min(x + reach, width - 1.0), min(y + reach, height - 1.0)
    return [Given(box=(x0, y0, x1, y1))]


# ----------------------------------------------------------------------------------------------------- negatives


@negative_rule
def far(look: Look, number: int) -> np.ndarray:
    """Points drawn off the object, far from it and from each other (Sengupta et al., arXiv 2408.04212).

    One after the other, of 64 uniform draws the one that is farthest from the object and from those before it.
    """
    rows, columns = np.nonzero(~look.mask)
    if len(rows) == 0:
        return np.zeros((0, 2), np.float32)
    distance = ndimage.distance_transform_edt(~look.mask)[rows, columns]
    random = np.random.default_rng(look.seed)
    chosen: list[int] = []
    for _ in range(min(number, len(rows))):
        draws = random.choice(len(rows), min(DRAWS, len(rows)), replace=False)
        best = int(draws[np.argmax(distance[draws])])
        chosen.append(best)
        distance = np.minimum(distance, np.hypot(rows - rows[best], columns - columns[best]))
    return np.stack([columns[chosen], rows[chosen]], 1).astype(np.float32)


@negative_rule
def near(look: Look, number: int) -> np.ndarray:
    """Points drawn in a band beside the object, 3 to 8 pixels from it; fewer where the band is small."""
    distance = ndimage.distance_transform_edt(~look.mask)
    rows, columns = np.nonzero((distance >= 3) & (distance <= 8))
    random = np.random.default_rng(look.seed)
    chosen = random.choice(len(rows), min(number, len(rows)), replace=False) if len(rows) else np.zeros(0, int)
    return np.stack([columns[chosen], rows[chosen]], 1).astype(np.float32).reshape(-1, 2)


@negative_rule
def others(look: Look, number: int) -> np.ndarray:
    """The clicks of the other objects on this frame (Lou et al., arXiv 2408.01648), of the largest of them first."""
    parts = [other & ~look.mask for other in sorted(look.others, key=lambda found: -int(found.sum()))]
    points = [component_points(part, 1) for part in parts if part.any()]
    return np.concatenate([np.zeros((0, 2), np.float32), *points[:number]])


# ------------------------------------------------------------------------------------------------------ geometry


def tight_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) around a bool mask [H, W]: the centres of its outermost pixels, as SAM 2's training has it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1]), float(rows[-1])


def deepest_point(mask: np.ndarray) -> tuple[float, float]:
    """(x, y) of the pixel of a bool mask [H, W] that is farthest from the outside.

    The Euclidean distance transform treats the picture's border as outside. Of equally deep pixels the one nearest
    to the mask's centroid is taken, so that a rectangle is clicked in its middle.
    """
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    rows, columns = np.nonzero(depth >= depth.max() - 1e-6)
    centre = ndimage.center_of_mass(mask)
    best = np.argmin((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2)
    return float(columns[best]), float(rows[best])


def components_by_size(mask: np.ndarray) -> list[np.ndarray]:
    """The 8-connected components of a bool mask [H, W], largest first."""
    labels, count = ndimage.label(mask, structure=ALL_NEIGHBOURS)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return [labels == value + 1 for value in np.argsort(-sizes, kind="stable")]


def component_points(mask: np.ndarray, most: int = 1) -> np.ndarray:
    """float32 [P, 2]: the deepest point of each of the `most` largest components of a bool mask [H, W]."""
    points = [deepest_point(component) for component in components_by_size(mask)[:most]]
    return np.asarray(points, dtype=np.float32)


def scattered_points(mask: np.ndarray, number: int, seed: tuple[int, ...]) -> np.ndarray:
    """float32 [P, 2]: the pixel of a bool mask [H, W] nearest to its centroid, then others drawn from it.

    P is `number`, or the object's number of pixels where that is smaller.
    """
    rows, columns = np.nonzero(mask)
    centre = int(np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2))
    rest = np.delete(np.arange(len(rows)), centre)
    drawn = np.random.default_rng(seed).choice(rest, min(number - 1, len(rest)), replace=False)
    chosen = np.concatenate([[centre], drawn]).astype(int)
    return np.stack([columns[chosen], rows[chosen]], 1).astype(np.float32)


def _diameter(mask: np.ndarray) -> np.ndarray:
    """Both ends float32 [2, 2] of the longest diameter of a bool mask [H, W]."""
    side = max(mask.shape)
    square = np.zeros((1, side, side), bool)
    square[0, : mask.shape[0], : mask.shape[1]] = mask
    return np.asarray(longest_diameter(torch.from_numpy(square))[0].numpy(), np.float32)
