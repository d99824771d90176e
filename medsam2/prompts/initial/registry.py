"""Which kinds of initial prompt exist.

To add a kind, add one file here with `NAME` and `simulate(scene, settings) -> Prompts`, and a weight of that name in
`PromptSettings`. `simulate` is tensor code over all objects at once: it never reads a value back to the host, draws
its numbers from `scene.seeds` with tags of its own, and returns as many points for each object as for any other
(those that an object lacks are labelled as padding).
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

from medsam2.plugins import by_name, modules_of
from medsam2.prompts.kinds import Prompts
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import PromptSettings


class InitialKind(Protocol):
    """What the module of a kind offers."""

    NAME: str

    def simulate(self, scene: Scene, settings: PromptSettings) -> Prompts: ...


@cache
def initial_kinds() -> dict[str, InitialKind]:
    """Every kind by name, one a file of this folder.

    Raises:
        RuntimeError: two files claim one name.
    """
    return by_name(modules_of(__package__, offers="simulate"), "kinds of prompt")
