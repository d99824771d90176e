"""A picture of every corruption: `python -m medsam2.evaluation.corruptions.pictures docs/images/corruptions.jpg`.

On generated cases of four modalities, at severities 1, 3 and 5, beside the clean picture.
"""

from __future__ import annotations

import io
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from medsam2.evaluation.corruptions.registry import corrupt, registry
from medsam2.evaluation.sources import CaseObject, LoadedCase
from medsam2.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = (0, 1, 3, 5)
MODALITIES = {"imagenet_c": "ENDOSCOPY", "surgical": "ENDOSCOPY"}  # of the others, the first that it is made for
BLOCKS = 3  # corruptions beside each other in one row
PANEL = 1.32  # inches
GROUND, TEXT, DIM = "#0b0f14", "#e6edf3", "#8b98a5"
DOTS, QUALITY = 100, 78


@cache
def example(modality: str, index: int = 3) -> LoadedCase:
    """A generated case, windowed to uint8 as a data set's would be.

    Args:
        modality: CT, MR, US or ENDOSCOPY. index: which one.
    """
    from medsam2.cases.intensity import to_uint8
    from medsam2.cases.phantoms import generate

    case = generate(modality, 0, index)
    image, _ = to_uint8(case)
    frames = torch.from_numpy(np.ascontiguousarray(image))
    labels = [label for label in case.labels if (case.planes[label.plane] == label.id).any()]
    return LoadedCase(
        frames=frames[:, None] if frames.ndim == 3 else frames.permute(0, 3, 1, 2).contiguous(),
        planes=case.planes,
        objects=tuple(CaseObject(label.name, label.plane, label.id) for label in labels),
        spacing=case.spacing,
        kind=case.kind,
        modality=case.modality,
        dataset=case.dataset,
        case=case.case_id,
        patient=case.patient_id,
    )


def draw(path: Path, only: tuple[str, ...] = ()) -> None:
    """Write the picture (jpg or png), of all corruptions or of those in `only`."""
    from matplotlib.figure import Figure

    chosen = [corruption for corruption in registry().values() if not only or corruption.name in only]
    rows = -(-len(chosen) // BLOCKS)
    widths = ([1.0] * len(SHOWN) + [0.12]) * BLOCKS
    figure = Figure(figsize=(PANEL * sum(widths), PANEL * 1.16 * rows), facecolor=GROUND)
    grid = figure.add_gridspec(
        rows, len(widths), width_ratios=widths, left=0.005, right=0.995, top=1 - 0.2 / (PANEL * rows), bottom=0.004,
        wspace=0.03, hspace=0.16,
    )  # fmt: skip
    for place, corruption in enumerate(chosen):
        modality = MODALITIES.get(corruption.suite, "") or _first(corruption.modalities)
        case = example(modality)
        row, first = place % rows, place // rows * (len(SHOWN) + 1)
        for column, severity in enumerate(SHOWN):
            axes = figure.add_subplot(grid[row, first + column])
            damaged = corrupt(case, corruption.name, severity) if severity else case
            _show(axes, damaged, corruption.name == "thick_slices")
            if not column:
                axes.set_title(corruption.name.replace("_", " "), color=TEXT, fontsize=8, loc="left", pad=2)
            axes.set_title(str(severity or ""), color=DIM, fontsize=7, loc="right", pad=2)
    buffer = io.BytesIO()
    kind = path.suffix.lstrip(".").lower()
    figure.savefig(buffer, format=kind, dpi=DOTS, facecolor=GROUND, pil_kwargs={"quality": QUALITY, "optimize": True})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def _first(modalities: tuple[str, ...]) -> str:
    """The first of them that there are generated cases of."""
    from medsam2.cases.phantoms import PHANTOM_MODALITIES

    return next((modality for modality in modalities if modality in PHANTOM_MODALITIES), PHANTOM_MODALITIES[0])


def _show(axes: Axes, case: LoadedCase, along: bool) -> None:
    """The middle frame; with `along` a cut through the slices instead, in its true proportions."""
    frames = case.frames.permute(0, 2, 3, 1).numpy()
    cut = frames[:, frames.shape[1] // 2] if along else frames[len(frames) // 2]
    aspect = case.spacing[0] / case.spacing[2] if along else case.spacing[1] / case.spacing[2]
    image = cut[..., 0] if cut.shape[2] == 1 else cut
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, aspect=aspect if case.kind == "volume" else "equal")
    axes.set_axis_off()


if __name__ == "__main__":
    draw(Path(sys.argv[1] if len(sys.argv) > 1 else "corruptions.jpg"))
