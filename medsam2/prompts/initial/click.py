"""One positive click inside the object; a negative one anywhere where the object is absent."""

from __future__ import annotations

import torch

from medsam2.prompts.kinds import NEGATIVE, POSITIVE, Prompts
from medsam2.prompts.regions import click_inside
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import PromptSettings

NAME = "click"
TAG_CLICK = 211


def simulate(scene: Scene, settings: PromptSettings) -> Prompts:
    points = click_inside(scene.clickable, scene.seeds, scene.tag(TAG_CLICK), settings.click_candidates)
    labels = torch.where(scene.present, POSITIVE, NEGATIVE).to(torch.int32)
    return Prompts(points=points[:, None], labels=labels[:, None])
