"""Resident memory while a long clip is predicted in both directions, with frames generated on access.

Run it as `predict.py --long`: the shipped nano, 128 px, two objects prompted in the middle. Because frames are
generated, only the predictor can use more and more memory. Draws docs/images/predict-memory.png.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

SIDE, EVERY = 128, 50
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "predict-memory.png"


class Drawn:
    """Two moving discs, uint8 [1, S, S], drawn for each access."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Any:
        import numpy as np
        import torch

        frame = np.random.default_rng(index).normal(80, 12, (SIDE, SIDE))
        y, x = np.mgrid[:SIDE, :SIDE]
        for n, centre in enumerate((40, 88)):
            drift = 10 * np.sin(index / 40 + n)
            frame[(x - centre - drift) ** 2 + (y - centre) ** 2 < 200] += 80
        return torch.from_numpy(frame.clip(0, 255).astype(np.uint8))[None]


def resident_mb() -> float:
    """Return the current resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main(length: int) -> None:
    from medsam2.inference.predictor import FramePrompt, Predictor
    from medsam2.model.build import load_model
    from medsam2.model.tracker import Tracker

    tracker = Tracker(load_model("nano").sam).eval()
    middle = length // 2
    prompts = [
        FramePrompt(middle, n, box=(centre - 25.0, centre - 15.0, centre + 25.0, centre + 15.0))
        for n, centre in enumerate((40, 88))
    ]
    curve: list[tuple[int, float]] = []
    for visited, _ in enumerate(Predictor(tracker).stream(Drawn(length), prompts, "both")):
        if visited % EVERY == 0:
            curve.append((visited, resident_mb()))
    draw(curve)
    settled = [memory for visited, memory in curve if visited >= length // 10]
    growth = settled[-1] - settled[0]
    print(
        f"{length} frames: {settled[0]:.0f} MiB after a tenth, {settled[-1]:.0f} at the end, {max(settled):.0f} at most"
    )
    report = {
        "name": "predict_long",
        "machine": platform.machine(),
        "frames": length,
        "memory_mb_after_a_tenth": round(settled[0], 1),
        "memory_mb_at_the_end": round(settled[-1], 1),
        "growth_mb": round(growth, 1),
    }
    print(json.dumps(report))


def draw(curve: list[tuple[int, float]]) -> None:
    """Save the curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(*zip(*curve, strict=True), color="#1f5f99")
    axes.set_ylim(0, 1.2 * max(memory for _, memory in curve))
    axes.set_xlabel("frames visited")
    axes.set_ylabel("resident memory, MiB")
    axes.grid(alpha=0.3)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)
