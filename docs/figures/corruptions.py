"""A picture of every corruption: `python docs/figures/corruptions.py docs/images/corruptions.jpg`.

On generated cases of four modalities, at severities 1, 3 and 5, beside the clean frame.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch

from medsam2.cases.intensity import to_uint8
from medsam2.demo.phantoms import PHANTOM_MODALITIES, generate
from medsam2.evaluation.corruptions.registry import CORRUPTIONS, Corruption, corrupt
from medsam2.evaluation.loaded_case import LoadedCase
from medsam2.reporting.overlays import Frame, Strip, draw_sheet, encode

SEVERITIES = (0, 1, 3, 5)
CORRUPTIONS_PER_ROW, SIDE = 3, 130  # pixels of a drawn frame


@cache
def example(modality: str) -> LoadedCase:
    """A generated case without its objects, windowed to uint8 as a dataset's would be."""
    case = generate(modality, 0, 3)
    image = np.ascontiguousarray(to_uint8(case)[0])
    frames = torch.from_numpy(image[..., None] if image.ndim == 3 else image).permute(0, 3, 1, 2).contiguous()
    return LoadedCase(
        frames, case.planes, (), case.spacing, case.kind, case.modality, case.dataset, case.case_id, case.patient_id
    )


def frames_of(corruption: Corruption) -> list[Frame]:
    """The middle frame at each severity; of thick slices a cut through them."""
    known = [m for m in corruption.modalities if m in PHANTOM_MODALITIES] or list(PHANTOM_MODALITIES)
    case = example("ENDOSCOPY" if corruption.suite in ("imagenet_c", "surgical") else known[0])
    frames = []
    for severity in SEVERITIES:
        damaged = corrupt(case, corruption.name, severity) if severity else case
        images = damaged.frames.permute(0, 2, 3, 1).numpy()
        if corruption.name == "thick_slices":
            images = np.repeat(images, round(case.spacing[0] / case.spacing[1]), axis=0).transpose(1, 0, 2, 3)
        image = images[len(images) // 2]
        title = f"severity {severity}" if severity else corruption.name.replace("_", " ")
        frames.append(Frame(image[..., 0] if image.shape[-1] == 1 else image, title=title))
    return frames


def main(path: Path) -> None:
    panels = [frames_of(corruption) for corruption in CORRUPTIONS.values()]
    rows = [panels[start : start + CORRUPTIONS_PER_ROW] for start in range(0, len(panels), CORRUPTIONS_PER_ROW)]
    sheet = draw_sheet([Strip(tuple(frame for panel in row for frame in panel)) for row in rows], side=SIDE)
    path.write_bytes(encode(sheet, "JPEG", 70))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
