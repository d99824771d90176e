"""Which frames evaluation prompts: one small function a rule, registered by its name. Deterministic.

To add a rule, write a function from `Shown` to frames and put `@rule` above it: it can then be named in any protocol.

Legend: T slices or frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from medsam2.plugins import register


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


Rule = Callable[[Shown], np.ndarray]
SLICE_RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Make a function known under its own name.

    Raises:
        RuntimeError: the name is taken.
    """
    return register(SLICE_RULES, function.__name__, function, "slice rules")


def choose_frames(shown: Shown, name: str) -> tuple[int, ...]:
    """The frames to prompt, in order of time.

    Raises:
        ValueError: the object is nowhere, or the rule is unknown.
    """
    if name not in SLICE_RULES:
        raise ValueError(f"unknown slice rule {name!r}; known: {', '.join(SLICE_RULES)}")
    if not shown.areas.any():
        raise ValueError("the object is empty on every frame: there is nothing to prompt")
    return tuple(sorted(int(frame) for frame in SLICE_RULES[name](shown)))


def comes_into_view(present: np.ndarray) -> np.ndarray:
    """The frames bool [T] on which something is there that was not on the frame before."""
    return np.asarray(present & ~np.concatenate([[False], present[:-1]]))


@rule
def first(shown: Shown) -> np.ndarray:
    """The first frame that shows the object."""
    return shown.frames[:1]


@rule
def last(shown: Shown) -> np.ndarray:
    """The last frame that shows the object."""
    return shown.frames[-1:]


@rule
def caudal(shown: Shown) -> np.ndarray:
    """The end of the object nearest to the feet: axial volumes are read feet first."""
    return shown.frames[:1]


@rule
def cranial(shown: Shown) -> np.ndarray:
    """The end of the object nearest to the head."""
    return shown.frames[-1:]


@rule
def middle(shown: Shown) -> np.ndarray:
    """The middle of the list of frames that show the object."""
    return shown.frames[[len(shown.frames) // 2]]


@rule
def largest(shown: Shown) -> np.ndarray:
    """The frame with the largest area, the earliest of equals."""
    return np.asarray([np.argmax(shown.areas)])


@rule
def spread(shown: Shown) -> np.ndarray:
    """Every n // 4-th of the n frames, the first dropped, three kept (Dong et al.); all where n is below four."""
    step = len(shown.frames) // 4
    return shown.frames if step == 0 else shown.frames[::step][1:4]


@rule
def both_ends(shown: Shown) -> np.ndarray:
    """The first and the last frame that show the object."""
    return np.unique(shown.frames[[0, -1]])


@rule
def every(shown: Shown) -> np.ndarray:
    """Every k-th frame of the clip counted from the first one with the object, where it is seen then."""
    start = shown.frames[0]
    return shown.frames[(shown.frames - start) % shown.step == 0]


@rule
def enters(shown: Shown) -> np.ndarray:
    """Each frame on which the object comes into view, the first time and whenever it had been away."""
    return np.flatnonzero(comes_into_view(shown.areas > 0))


@rule
def any_enters(shown: Shown) -> np.ndarray:
    """The object's first frame, and each later one that shows it when any object of the scene comes into view."""
    again = np.flatnonzero(shown.entries() & (shown.areas > 0))
    return np.union1d(shown.frames[:1], again)
