"""`PlanEntry`: one clip of the plan, decided before anything is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlanEntry:
    """One clip.

    Attributes:
        folder, row: the segment: index of the shard folder and row of its index.
        frames: positions in the segment in the clip's order; an entry of a shorter segment repeats some.
        objects: rows of the segment's object table.
        seed: the seed of the clip's augmentation and prompts, below 2**63.
        position: the place among the clips of its stream over the run.
        attempt: 0, or how many damaged segments this entry replaces.
        stream: "clips" or "stills".
        prompt_frame: the clip's frame that is prompted first; every object is present there.
    """

    folder: int
    row: int
    frames: tuple[int, ...]
    objects: tuple[int, ...]
    seed: int
    position: int
    attempt: int = 0
    stream: str = "clips"
    prompt_frame: int = 0
