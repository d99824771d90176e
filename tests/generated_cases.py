"""Generated cases as evaluation loads them."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from medsam2.cases.intensity import to_uint8
from medsam2.demo.phantoms import generate
from medsam2.evaluation.loaded_case import LoadedCase


@cache
def example(modality: str) -> LoadedCase:
    """A generated case, windowed to uint8 as a dataset's would be. modality: CT, MR, US or ENDOSCOPY."""
    case = generate(modality, 0, 3)
    image = np.ascontiguousarray(to_uint8(case)[0])
    frames = torch.from_numpy(image[..., None] if image.ndim == 3 else image).permute(0, 3, 1, 2).contiguous()
    labels = [label for label in case.labels if (case.planes[label.plane] == label.id).any()]
    objects = tuple(labels)
    return LoadedCase(
        frames, case.planes, objects, case.spacing, case.kind, case.modality, case.dataset, case.case_id,
        case.patient_id,
    )  # fmt: skip
