"""The objects of one frame, from which initial prompts are simulated.

Legend: N objects, S side of the model's input.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from medsam2.prompts import randomness
from medsam2.prompts.randomness import RandomStream


@dataclass(frozen=True, eq=False)
class Scene:
    """N objects on one frame.

    Attributes:
        masks: bool [N, S, S]. seeds: int64 [N], one per object.
        frame: index in the clip, on which random numbers depend.
        others: bool [N, S, S], the pixels of the other objects of each object's clip; None if unknown.
    """

    masks: Tensor
    seeds: Tensor
    frame: int
    others: Tensor | None = None

    def uniform(self, stream: RandomStream, count: int) -> Tensor:
        """Draw `count` numbers from [0, 1) for each object on this frame: float32 [N, count]."""
        return randomness.uniform(self.seeds, stream, count, self.frame)

    def normal(self, stream: RandomStream, count: int) -> Tensor:
        """Draw `count` standard normal numbers for each object on this frame: float32 [N, count]."""
        return randomness.normal(self.seeds, stream, count, self.frame)

    @property
    def size(self) -> int:
        return int(self.masks.shape[-1])

    @cached_property
    def present(self) -> Tensor:
        """bool [N]: whether each object has a pixel on this frame."""
        return self.masks.flatten(1).any(1)

    @cached_property
    def clickable(self) -> Tensor:
        """bool [N, S, S]: the object, or the whole frame if it is absent, so that there is a pixel to draw."""
        return self.masks | ~self.present[:, None, None]


def other_objects(masks: Tensor, object_to_clip: Tensor, clips: int) -> Tensor:
    """Return the pixels of all other objects of each object's clip: masks bool [N, S, S] -> bool [N, S, S].

    Args:
        object_to_clip: int64 [N]. clips: number of clips.
    """
    per_clip = masks.new_zeros(clips, *masks.shape[1:], dtype=torch.int32)
    per_clip = per_clip.index_add(0, object_to_clip, masks.to(torch.int32))
    return per_clip[object_to_clip] > masks.to(torch.int32)
