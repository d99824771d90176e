"""The kinds of initial prompts that training simulates, registered by name.

To add a kind, put a file here with a function from `Scene` to `Prompts` and `@initial_kind` above it, and name it in a
recipe: `kinds: {NAME: WEIGHT}` in configs/prompts/. Such a function is tensor code over all objects at once: it never
reads a value back to the host, draws its numbers by `scene.uniform` and `scene.normal` from streams of its own, and
returns as many points for each object as for any other (those that an object lacks are labelled as padding).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from medsam2.plugins import modules_of, register
from medsam2.prompts.kinds import Prompts
from medsam2.prompts.scene import Scene
from medsam2.prompts.settings import PromptSettings

Simulate = Callable[[Scene, PromptSettings], Prompts]
_KINDS: dict[str, Simulate] = {}


def initial_kind(function: Simulate) -> Simulate:
    """Make a function known as the kind of its own name.

    Raises:
        RuntimeError: the name is taken.
    """
    return register(_KINDS, function.__name__, function, "kinds of prompt")


@cache
def initial_kinds() -> dict[str, Simulate]:
    """Every kind by name, from all files of this folder."""
    for _ in modules_of(__package__):
        pass  # importing a file registers its kinds
    return _KINDS
