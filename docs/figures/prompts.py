"""A picture of every kind of prompt on one made-up object: `python docs/figures/prompts.py docs/images/prompts.png`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from medsam2.prompts.initial import INITIAL_KINDS
from medsam2.prompts.kinds import BOX_TOP_LEFT, NEGATIVE, POSITIVE, Prompts
from medsam2.prompts.randomness import uniform
from medsam2.prompts.scene import other_objects
from medsam2.prompts.settings import PointSettings, PromptSettings
from medsam2.prompts.simulate import correction_click, dense_prompts, initial_prompts
from medsam2.reporting.overlays import Frame, Outline, Strip, box_outline, draw_sheet, encode
from medsam2.reporting.style import OTHERS, PREDICTIONS, PROMPT, TRUTH

SIDE, PANELS_PER_ROW = 256, 5  # pixels of the made-up frame
SETTINGS = PromptSettings(click_candidates=3, points=PointSettings(positives=(3, 3), negatives=(3, 3)), from_truth=0.0)


def example_objects() -> Tensor:
    """Two neighbours, the first one bent: bool [2, SIDE, SIDE]."""
    grid = (torch.arange(SIDE) + 0.5) / SIDE
    y, x = torch.meshgrid(grid, grid, indexing="ij")

    def blob(cx: float, cy: float, radius: float, waves: tuple[tuple[int, float, float], ...]) -> Tensor:
        angle = torch.atan2(y - cy, x - cx)
        edge = 1 + sum(share * torch.cos(number * angle + phase) for number, share, phase in waves)
        return torch.hypot(x - cx, y - cy) < radius * edge

    first = blob(0.42, 0.52, 0.29, ((2, 0.3, 0.7), (3, 0.22, 1.9), (5, 0.04, 0.3)))
    return torch.stack([first, blob(0.86, 0.33, 0.13, ((2, 0.15, 2.0), (3, 0.08, 0.5))) & ~first])


def main(path: Path, seed: int = 23) -> None:
    masks, seeds = example_objects(), torch.tensor([seed, seed + 1])
    noise = F.avg_pool2d(uniform(torch.arange(SIDE), 1, SIDE)[None] - 0.5, 5, 1, 2)[0]
    image = ((0.28 + 0.22 * masks[0] + 0.16 * masks[1] + 0.9 * noise).clamp(0, 1) * 255).byte().numpy()

    def panel(title: str, prompts: Prompts, filled: Tensor | None = None, colour: str = PROMPT) -> Frame:
        outlines = [Outline(masks[1].numpy(), OTHERS), Outline(masks[0].numpy(), TRUTH)]
        if filled is not None:
            outlines.append(Outline(filled.numpy(), colour, filled=True))
        points = []
        if prompts.points is not None and prompts.labels is not None:
            pairs = list(zip(prompts.points[0].tolist(), prompts.labels[0].tolist(), strict=True))
            points = [(x, y, label == POSITIVE) for (x, y), label in pairs if label in (POSITIVE, NEGATIVE)]
            if pairs[0][1] == BOX_TOP_LEFT:
                outlines.append(box_outline((SIDE, SIDE), (*pairs[0][0], *pairs[1][0])))
        return Frame(image, tuple(outlines), tuple(points), title)

    others = other_objects(masks, torch.zeros(2, dtype=torch.int64), 1)
    frames = []
    for kind in INITIAL_KINDS:
        prompts = initial_prompts(masks, kind, seeds, 0, SETTINGS, others)
        frames.append(panel(kind, prompts, masks[0] if prompts.masks is not None else None))
    empty, logits = dense_prompts(masks, (SIDE // 4, SIDE // 4), seeds, 0)
    frames.append(panel("mask, damaged", empty, F.interpolate(logits, (SIDE, SIDE))[0, 0] > 0))
    guess = masks.roll((18, 13), (1, 2))
    clicks = Prompts(*(torch.cat(parts, 1) for parts in zip(
        *(correction_click(guess, masks, seeds, 0, step, SETTINGS) for step in range(4)), strict=True)))  # fmt: skip
    frames.append(panel("corrections of a guess", clicks, guess[0], PREDICTIONS[0]))
    rows = range(0, len(frames), PANELS_PER_ROW)
    legend = (("object", TRUTH), ("its neighbour", OTHERS), ("prompt", PROMPT), ("guess", PREDICTIONS[0]))
    sheet = draw_sheet([Strip(tuple(frames[row : row + PANELS_PER_ROW])) for row in rows], legend=legend)
    path.write_bytes(encode(sheet, "PNG"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
