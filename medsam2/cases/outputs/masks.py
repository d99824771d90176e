"""What is written: a label map, frame by frame, with the pictures below it and the way back to the source's grid.

Legend: T slices or frames, H and W pixels as the network saw them; Z, Y, X of the source's own array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medsam2.cases.case import Orientation


@dataclass(frozen=True, eq=False)
class Masks:
    """A label map that need not be in memory.

    Attributes:
        names: of the objects. values: their values in the label map, above 0.
        shape: (T, H, W).
        labels: frame -> label map [H, W], unsigned integers. picture: frame -> uint8 [H, W] or [H, W, 3].
        spacing: (z in mm, or seconds if `moving`; y, x in mm) of [T, H, W].
        moving: whether T is time.
        orientation: how the source's array was turned. affine: RAS+ of [T, H, W], or None.
        sources: the source's files in no order. stems: names of its frames without ending, where they have any.
        where: the input, for messages.
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
        """uint8, or uint16 where a value asks for it."""
        return np.dtype(np.uint8 if max(self.values, default=0) < 256 else np.uint16)

    def volume(self) -> np.ndarray:
        """The whole label map [T, H, W]."""
        volume = np.empty(self.shape, self.dtype)
        for frame in range(self.shape[0]):
            volume[frame] = self.labels(frame)
        return volume

    def source_slices(self) -> Iterator[np.ndarray]:
        """The slices [Y, X] of the source's own array in order; one at a time where nothing was turned."""
        if self.orientation.turned:
            yield from self.orientation.undo(self.volume())
        else:
            for frame in range(self.shape[0]):
                yield self.labels(frame).astype(self.dtype, copy=False)


@dataclass(frozen=True)
class Output:
    """A format that masks are written in.

    Attributes:
        name: what `--format` says. writes: a line for the help.
        endings: of file names; none where a folder is written.
        default_for: inputs whose masks it is for unless the user says otherwise: endings of volume files, or names of
            `formats`.
        write: (path, masks) -> None. The path does not exist and has one of the endings; renaming the result into
            place, and refusing to replace what is there, is done by `registry`.
        check: raises a `UserError` before anything is predicted, where the format cannot hold such masks.
    """

    name: str
    writes: str
    endings: tuple[str, ...]
    default_for: tuple[str, ...]
    write: Callable[[Path, Masks], None]
    check: Callable[[Masks], None] = lambda masks: None
