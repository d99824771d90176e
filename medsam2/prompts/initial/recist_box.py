"""The square box around the RECIST line: centred on the line, its side the line's length (lesions without a mask)."""

from __future__ import annotations

import torch

from medsam2.prompts.initial.recist import drawn_line
from medsam2.prompts.kinds import Prompts
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import PromptSettings

NAME = "recist_box"


def simulate(scene: Scene, settings: PromptSettings) -> Prompts:
    ends = drawn_line(scene, settings)
    centre = ends.mean(1)
    reach = 0.5 * (ends[:, 1] - ends[:, 0]).norm(dim=1, keepdim=True)
    boxes = torch.cat([centre - reach, centre + reach], 1).clamp(0, scene.size - 1)
    return Prompts.from_boxes(boxes).hide_absent(scene.masks)
