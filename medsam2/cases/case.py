"""The `Case`: one scan, clip or still with its labels, as read from disk and before any reduction.

Legend used in the whole package: T slices or frames, H and W pixels, P label planes, N objects, B clips.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medsam2.cases.settings import MODALITIES as MODALITIES
from medsam2.cases.settings import DatasetSettings, Modality, Window
from medsam2.errors import UserError

Kind = Literal["volume", "clip", "still"]


class CaseError(UserError):
    """A case cannot be read or trusted; the message names the file, the value and the remedy."""


@dataclass(frozen=True)
class Label:
    """One named structure. `id` is the value in its label plane, `plane` the index of that plane."""

    id: int
    name: str
    plane: int = 0


@dataclass(frozen=True)
class Line:
    """A RECIST measurement: the longest diameter of a lesion, drawn on one slice, in pixels of the case's frames."""

    frame: int
    x0: float
    y0: float
    x1: float
    y1: float
    label: str


@dataclass(frozen=True)
class Orientation:
    """The signed permutation that turned a source's array [Z, Y, X] into [T, H, W], and the way back.

    Attributes:
        axes: for T, H and W the axis of the source's array. flips: whether it runs the other way.
    """

    axes: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)

    @property
    def turned(self) -> bool:
        return self != Orientation()

    @property
    def inverse(self) -> Orientation:
        """The permutation that leads back."""
        z, y, x = (self.axes.index(axis) for axis in range(3))
        return Orientation((z, y, x), (self.flips[z], self.flips[y], self.flips[x]))

    def apply(self, array: np.ndarray) -> np.ndarray:
        """[Z, Y, X, ...] of the source as [T, H, W, ...]; no voxel is interpolated."""
        if not self.turned:
            return array
        turned = np.transpose(array, (*self.axes, *range(3, array.ndim)))
        return np.ascontiguousarray(turned[tuple(slice(None, None, -1 if flip else None) for flip in self.flips)])

    def place(self, point: Sequence[float], shape: Sequence[int]) -> tuple[float, float, float]:
        """(t, h, w) of a voxel at (z, y, x) of the source's array [Z, Y, X] of this shape."""
        flipped = zip(self.axes, self.flips, strict=True)
        t, h, w = (shape[axis] - 1 - point[axis] if flip else point[axis] for axis, flip in flipped)
        return t, h, w

    def undo(self, array: np.ndarray) -> np.ndarray:
        """[T, H, W, ...] as [Z, Y, X, ...] of the source."""
        return self.inverse.apply(array)


@dataclass(frozen=True, eq=False)
class Case:
    """One scan, clip or still.

    Attributes:
        image: [T, H, W] grey or [T, H, W, 3] RGB, in the native type of the source (HU for CT), finite.
        planes: [P, T, H, W] integer label planes, 0 is background; P > 1 only where objects overlap.
        labels: the named structures that the planes may hold.
        spacing: (t or z, y, x); mm for volumes, (seconds, 1, 1) for clips whose pixel size is unknown.
        affine: 4x4 array index (x, y, z) -> world mm (RAS+), or None where the source has no geometry.
        modality: one of `MODALITIES`.
        kind: volume (slices in space), clip (frames in time) or still (T = 1).
        dataset, case_id, patient_id: names as the source has them; they never enter a shard unsalted.
        sources: the files it was read from.
        orientation: how the source's own array was turned; the way back for a predicted mask.
        window: (low, high) that the source itself asks for (DICOM), or None.
        lines: RECIST measurements that the source holds.
    """

    image: np.ndarray
    planes: np.ndarray
    labels: tuple[Label, ...]
    spacing: tuple[float, float, float]
    modality: Modality
    kind: Kind
    dataset: str
    case_id: str
    patient_id: str
    affine: np.ndarray | None = None
    sources: tuple[Path, ...] = field(default=())
    orientation: Orientation = Orientation()
    window: Window | None = None
    lines: tuple[Line, ...] = ()

    def __post_init__(self) -> None:
        if self.image.ndim not in (3, 4) or (self.image.ndim == 4 and self.image.shape[-1] != 3):
            raise CaseError(f"{self.where}: image must be [T, H, W] or [T, H, W, 3], found {self.image.shape}")
        if self.planes.ndim != 4 or self.planes.shape[1:] != self.image.shape[:3]:
            raise CaseError(
                f"{self.where}: label planes {self.planes.shape} do not match the image {self.image.shape[:3]}"
            )
        if self.modality not in MODALITIES:
            raise CaseError(f"{self.where}: modality {self.modality!r} is not one of {', '.join(MODALITIES)}")

    @property
    def where(self) -> str:
        """The first source file, or the case's name: what an error should point at."""
        return str(self.sources[0]) if self.sources else f"{self.dataset}/{self.case_id}"

    @property
    def content_hash(self) -> str:
        """sha256 (hex) of the image's shape and values: the same scan under another name or in another format.

        The values are hashed in the smallest common type that holds them, so that a DICOM series and its copy in a
        NIfTI file of floats are one scan.
        """
        kind = smallest_type(self.image)
        digest = hashlib.sha256(f"{self.image.shape}{kind.str}".encode())
        for part in self.image:  # slice by slice: no second copy of the volume
            digest.update(np.ascontiguousarray(part, dtype=kind).data)
        return digest.hexdigest()


def smallest_type(image: np.ndarray) -> np.dtype:
    """uint8, int16 or int32 where all values of [T, ...] are whole and fit, else float32."""
    if image.dtype == np.uint8 or image.dtype == np.bool_ or not image.size:
        return np.dtype("u1")
    if image.dtype.kind == "f" and not all(np.array_equal(part, np.rint(part)) for part in image):
        return np.dtype("<f4")
    low, high = image.min(), image.max()
    for kind in ("u1", "<i2", "<i4"):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return np.dtype(kind)
    return np.dtype("<f4")


GENERATED_SOURCE = "medsam2 demo cases (generated; no patient data)"
LICENCES = (
    "Apache-2.0", "MIT", "BSD-3-Clause", "CC0-1.0", "CC0", "CC-BY-4.0", "CC-BY-3.0", "CC-BY-SA-4.0", "CC-BY-SA-3.0",
    "CC-BY-ND-4.0", "CC-BY-NC-4.0", "CC-BY-NC-3.0", "CC-BY-NC-SA-4.0", "CC-BY-NC-SA-3.0", "CC-BY-NC-ND-4.0", "ODbL-1.0",
    "PDDL-1.0",
)  # fmt: skip


def _letters(text: str) -> str:
    """Letters and digits alone: "CC-BY-SA 4.0" and "cc by-sa-4.0" are the same licence."""
    return "".join(character for character in text.lower() if character.isalnum())


LICENCE_BY_LETTERS = {_letters(name): name for name in LICENCES}


@dataclass(frozen=True)
class Origin:
    """Source and licence of a data set; "" where it states none, or in words of its own.

    Free text may hold names, of patients too, and goes nowhere: what is kept is one of a few
    known words.
    """

    source: str = ""
    licence: str = ""

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Origin:
        """What a `dataset.json`, a data list or a `meta.json` says."""
        said = [_letters(str(description.get(key) or "")) for key in ("licence", "license")]
        licence = next((LICENCE_BY_LETTERS[letters] for letters in said if letters in LICENCE_BY_LETTERS), "")
        return cls(GENERATED_SOURCE if description.get("source") == GENERATED_SOURCE else "", licence)


@dataclass(frozen=True)
class Part:
    """Which part of its image files a case is: all of them, unless an attribute says otherwise.

    Attributes:
        channel: the number of the one channel that it is. inside: the channels are the fourth axis of one file.
        time_slice: the slice of a 4-D file, which is a clip in time.
        rgb: three channels, of one file or of three, make one image in colour.
        file_per_structure: every mask file is one structure; the labels name them in the order of the masks.
    """

    channel: int | None = None
    inside: bool = False
    time_slice: int | None = None
    rgb: bool = False
    file_per_structure: bool = False


@dataclass(frozen=True)
class CaseRef:
    """A case that a layout listed and nobody has read yet; cheap to keep by the thousand and to send to a process.

    Attributes:
        dataset, case_id, patient_id: names as the source has them; the patient is the case where none is named.
        layout: the `NAME` of the layout that listed it. modality: one of `MODALITIES`, or "" where unknown.
        images, masks: its files or folders. part: which part of them it is.
        labels: (values, name) pairs that the data set declares; empty where it declares none.
        spacing: what the data set says outside of its files: seconds a frame, mm a pixel; 0 where unknown.
        recist: lines that the data set gives, in the pixels of the source: (slice, x0, y0, x1, y1, name of the label).
        split: the split that the data set itself prescribes, or "".
        origin: what the data set says of itself; what `settings` says goes before it.
        settings: what the user says about its data set.
        problem: why it cannot be read, where listing it already told.
    """

    dataset: str
    case_id: str
    patient_id: str = ""
    layout: str = ""
    images: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()
    modality: str = ""
    labels: tuple[tuple[tuple[int, ...], str], ...] = ()
    spacing: tuple[float, float] = (0.0, 0.0)
    part: Part = Part()
    recist: tuple[tuple[int, float, float, float, float, str], ...] = ()
    split: str = ""
    origin: Origin = Origin()
    settings: DatasetSettings = DatasetSettings()
    problem: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        return self.images + self.masks
