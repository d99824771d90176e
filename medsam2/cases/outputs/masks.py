"""The masks to write and the description of an output format.

Legend: T slices or frames, H and W pixels of the network's input; Z, Y, X are the axes of the source array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medsam2.cases.case import Orientation


@dataclass(frozen=True, eq=False)
class Masks:
    """A label map that is read frame by frame, so that it need not fit in memory, and its place on the source grid.

    Attributes:
        names: names of the objects. values: their values in the label map, all above 0.
        shape: (T, H, W).
        labels: frame -> label map [H, W], unsigned integers. picture: frame -> uint8 [H, W] or [H, W, 3].
        spacing: (z in mm, or seconds if `moving`; y, x in mm) of [T, H, W].
        moving: whether T is time.
        orientation: how the source array was turned. affine: RAS+ of [T, H, W], or None.
        sources: the source files in any order. stems: names of its frames without ending; empty if they have none.
        where: name of the input in messages.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    shape: tuple[int, int, int]
    labels: Callable[[int], np.ndarray]
    picture: Callable[[int], np.ndarray]
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    moving: bool = False
    orientation: Orientation = Orientation()
    affine: np.ndarray | None = None
    sources: tuple[Path, ...] = ()
    stems: tuple[str, ...] = ()
    where: str = ""

    @property
    def dtype(self) -> np.dtype:
        """uint8, or uint16 if a value exceeds 255."""
        return np.dtype(np.uint8 if max(self.values, default=0) < 256 else np.uint16)

    def volume(self) -> np.ndarray:
        """Return the whole label map [T, H, W]."""
        volume = np.empty(self.shape, self.dtype)
        for frame in range(self.shape[0]):
            volume[frame] = self.labels(frame)
        return volume

    def source_slices(self) -> Iterator[np.ndarray]:
        """Yield the slices [Y, X] of the source array in order; a turned array is held in memory as a whole."""
        if self.orientation.turned:
            yield from self.orientation.undo(self.volume())
        else:
            for frame in range(self.shape[0]):
                yield self.labels(frame).astype(self.dtype, copy=False)


@dataclass(frozen=True)
class Output:
    """A format in which masks are written.

    Attributes:
        name: value of `--format`. writes: one line for `--help`.
        endings: endings of file names; empty if the format is a folder.
        default_for: inputs for which this is the default format: endings of volume files, or names of `formats`.
        write: (path, masks) -> None. The path does not exist and has one of the endings; `registry` protects existing
            files and renames the result into place.
        check: raises a `UserError`, before anything is predicted, if the format cannot hold these masks.
    """

    name: str
    writes: str
    endings: tuple[str, ...]
    default_for: tuple[str, ...]
    write: Callable[[Path, Masks], None]
    check: Callable[[Masks], None] = lambda masks: None
