"""The `Case`: one scan, clip or still with its labels, as read from disk and before any reduction.

Legend used in the whole package: T slices or frames, H and W pixels, P label planes, N objects, B clips.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from medsam2.errors import UserError

Modality = Literal["CT", "MR", "PT", "US", "ENDOSCOPY", "XRAY", "PATHOLOGY", "MICROSCOPY", "OTHER"]
Kind = Literal["volume", "clip", "still"]
MODALITIES: tuple[str, ...] = get_args(Modality)


class CaseError(UserError):
    """A case cannot be read or trusted; the message names the file, the value and the remedy."""


@dataclass(frozen=True)
class Label:
    """One named structure. `id` is the value in its label plane, `plane` the index of that plane."""

    id: int
    name: str
    plane: int = 0


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
        """sha256 (hex) of the image's bytes, shape and type: the same scan under another name is recognised."""
        digest = hashlib.sha256(f"{self.image.shape}{self.image.dtype.str}".encode())
        digest.update(np.ascontiguousarray(self.image).data)
        return digest.hexdigest()
