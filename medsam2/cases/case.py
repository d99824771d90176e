"""The `Case`: one scan, clip or still with its labels, as read from disk, at full resolution.

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
    """A case cannot be read or is inconsistent; the message names the file, the value and the remedy."""


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
    """The signed permutation of axes that takes the source's array [Z, Y, X] to [T, H, W].

    Attributes:
        axes: the axis of the source's array for each of T, H and W. flips: whether that axis is reversed.
    """

    axes: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)

    @property
    def turned(self) -> bool:
        return self != Orientation()

    @property
    def inverse(self) -> Orientation:
        """The permutation from [T, H, W] back to [Z, Y, X]."""
        z, y, x = (self.axes.index(axis) for axis in range(3))
        return Orientation((z, y, x), (self.flips[z], self.flips[y], self.flips[x]))

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Reorient [Z, Y, X, ...] of the source to [T, H, W, ...] without interpolation."""
        if not self.turned:
            return array
        turned = np.transpose(array, (*self.axes, *range(3, array.ndim)))
        return np.ascontiguousarray(turned[tuple(slice(None, None, -1 if flip else None) for flip in self.flips)])

    def map_point(self, point: Sequence[float], shape: Sequence[int]) -> tuple[float, float, float]:
        """Return (t, h, w) of the voxel (z, y, x) of a source array with this shape [Z, Y, X]."""
        flipped = zip(self.axes, self.flips, strict=True)
        t, h, w = (shape[axis] - 1 - point[axis] if flip else point[axis] for axis, flip in flipped)
        return t, h, w

    def undo(self, array: np.ndarray) -> np.ndarray:
        """Reorient [T, H, W, ...] back to [Z, Y, X, ...] of the source."""
        return self.inverse.apply(array)


@dataclass(frozen=True, eq=False)
class Case:
    """One scan, clip or still.

    Attributes:
        image: [T, H, W] grey or [T, H, W, 3] RGB, in the native type of the source (HU for CT), finite.
        planes: [P, T, H, W] integer label planes, 0 is background; P > 1 only where objects overlap.
        labels: the named structures; a label may have no voxel.
        spacing: (t or z, y, x); mm for volumes, (seconds, 1, 1) for clips of unknown pixel size.
        affine: 4x4 array index (x, y, z) -> world mm (RAS+), or None where the source has no geometry.
        modality: one of `MODALITIES`.
        kind: volume (slices in space), clip (frames in time) or still (T = 1).
        dataset, case_id, patient_id: names from the source; shards hold only salted hashes of them.
        sources: the files that the case was read from.
        orientation: how the source's array was reoriented; its inverse takes a predicted mask back.
        window: (low, high) stored in the source (DICOM), or None.
        lines: RECIST measurements stored in the source.
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
            raise CaseError(f"{self.where}: image must be [T, H, W] or [T, H, W, 3], but has shape {self.image.shape}")
        if self.planes.ndim != 4 or self.planes.shape[1:] != self.image.shape[:3]:
            raise CaseError(
                f"{self.where}: label planes {self.planes.shape} do not match the image {self.image.shape[:3]}"
            )
        if self.modality not in MODALITIES:
            raise CaseError(f"{self.where}: modality {self.modality!r} is not one of {', '.join(MODALITIES)}")

    @property
    def where(self) -> str:
        """The first source file, or the case's name, for error messages."""
        return str(self.sources[0]) if self.sources else f"{self.dataset}/{self.case_id}"

    @property
    def content_hash(self) -> str:
        """sha256 (hex) of the image's shape and values, which identifies copies under other names or formats.

        The values are hashed in the smallest type that holds them, so that a DICOM series and its copy in a NIfTI
        file of floats have the same hash.
        """
        kind = smallest_type(self.image)
        digest = hashlib.sha256(f"{self.image.shape}{kind.str}".encode())
        for part in self.image:  # slice by slice, to avoid a second copy of the volume
            digest.update(np.ascontiguousarray(part, dtype=kind).data)
        return digest.hexdigest()


def smallest_type(image: np.ndarray) -> np.dtype:
    """Return uint8, int16 or int32 if all values of [T, ...] are whole numbers that fit, else float32."""
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
    """Keep only letters and digits, so that "CC-BY-SA 4.0" and "cc by-sa-4.0" compare equal."""
    return "".join(character for character in text.lower() if character.isalnum())


LICENCE_BY_LETTERS = {_letters(name): name for name in LICENCES}


@dataclass(frozen=True)
class Origin:
    """Source and licence of a dataset, or "" if they are missing or not in the known vocabulary.

    Free text is dropped, because it may hold names, also of patients.
    """

    source: str = ""
    licence: str = ""

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Origin:
        """Read the origin from a `dataset.json`, a data list or a `meta.json`."""
        names = [_letters(str(description.get(key) or "")) for key in ("licence", "license")]
        licence = next((LICENCE_BY_LETTERS[name] for name in names if name in LICENCE_BY_LETTERS), "")
        return cls(GENERATED_SOURCE if description.get("source") == GENERATED_SOURCE else "", licence)


@dataclass(frozen=True)
class Part:
    """The part of its image files that a case uses; by default all of them.

    Attributes:
        channel: the index of the only channel that the case uses.
        inside: whether channels are the fourth axis of one file, instead of one file per channel.
        time_slice: the index of the slice of a 4-D file; the slice is a clip in time.
        rgb: whether three channels, from one file or three, form one colour image.
        file_per_structure: whether every mask file is one structure; labels name them in the order of the masks.
    """

    channel: int | None = None
    inside: bool = False
    time_slice: int | None = None
    rgb: bool = False
    file_per_structure: bool = False


@dataclass(frozen=True)
class CaseRef:
    """A reference to a case that a layout listed but nobody has read; small, and cheap to send to a process.

    Attributes:
        dataset, case_id, patient_id: names from the source; without a patient's name, the case's name.
        layout: the `NAME` of the layout that listed it. modality: one of `MODALITIES`, or "" if unknown.
        images, masks: its files or folders. part: the part of them that the case uses.
        labels: (values, name) pairs that the dataset declares; may be empty.
        spacing: (seconds per frame, mm per pixel) from a description beside the files; 0 if unknown.
        recist: lines from the dataset, in pixels of the source: (slice, x0, y0, x1, y1, name of the label).
        split: the split that the dataset prescribes, or "".
        origin: source and licence from the dataset's description; `settings` takes precedence.
        settings: the user's settings for its dataset.
        problem: why the case cannot be read, if listing it already showed that.
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
