"""A box followed by a click inside the object; an absent object gets the negative click alone."""

from __future__ import annotations

from medsam2.prompts.initial import box, click
from medsam2.prompts.kinds import Prompts
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import PromptSettings

NAME = "box_click"


def simulate(scene: Scene, settings: PromptSettings) -> Prompts:
    clicks = click.simulate(scene, settings)
    assert clicks.points is not None and clicks.labels is not None
    return box.simulate(scene, settings).with_points(clicks.points, clicks.labels)
