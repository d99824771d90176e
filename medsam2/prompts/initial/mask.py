"""The ground truth itself, taken as the frame's output (SAM 2's semi-supervised video task)."""

from __future__ import annotations

from medsam2.prompts.kinds import Prompts
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import PromptSettings

NAME = "mask"


def simulate(scene: Scene, settings: PromptSettings) -> Prompts:
    return Prompts(masks=scene.masks[:, None])
