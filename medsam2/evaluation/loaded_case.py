"""A case in memory, ready for evaluation.

Legend: N objects, P label planes, T frames, C channels, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from medsam2.cases.case import Label


@dataclass(frozen=True, eq=False)
class LoadedCase:
    """A whole case in memory, ready for prediction and scoring.

    Attributes:
        frames: uint8 [T, C, H, W], C = 1 or 3. planes: integer label planes [P, T, H, W].
        objects: labels of N objects, each on at least one frame.
        spacing: (z or t, y, x) of this grid; mm for volumes. kind: volume, clip or still.
        case, patient: salted hashes. content_hash: of the native image, for the leak check.
    """

    frames: Tensor
    planes: np.ndarray
    objects: tuple[Label, ...]
    spacing: tuple[float, float, float]
    kind: str
    modality: str
    dataset: str
    case: str
    patient: str
    content_hash: str = ""

    def mask(self, index: int) -> np.ndarray:
        """Mask of object `index`, bool [T, H, W]."""
        return np.asarray(self.planes[self.objects[index].plane] == self.objects[index].id)
