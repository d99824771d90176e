"""What the kinds of prompts are simulated from: the objects of one frame.

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
        masks: bool [N, S, S]. seeds: int64 [N], one an object.
        frame: its index in the clip: frames of one clip get different numbers.
        others: bool [N, S, S], the pixels of the clip's other objects; None where they are not known.
    """

    masks: Tensor
    seeds: Tensor
    frame: int
    others: Tensor | None = None

    def uniform(self, stream: RandomStream, count: int) -> Tensor:
        """`count` numbers in [0, 1) for each object on this frame: float32 [N, count]."""
        return randomness.uniform(self.seeds, stream, count, self.frame)

    def normal(self, stream: RandomStream, count: int) -> Tensor:
        """`count` standard normal numbers for each object on this frame: float32 [N, count]."""
        return randomness.normal(self.seeds, stream, count, self.frame)

    @property
    def size(self) -> int:
        return int(self.masks.shape[-1])

    @cached_property
    def present(self) -> Tensor:
        """bool [N]: whether the object has a pixel here."""
        return self.masks.flatten(1).any(1)

    @cached_property
    def clickable(self) -> Tensor:
        """bool [N, S, S]: the object, or everything where it is absent, so that no draw is from an empty region."""
        return self.masks | ~self.present[:, None, None]


def other_objects(masks: Tensor, object_to_clip: Tensor, clips: int) -> Tensor:
    """The pixels of every object's neighbours in its clip: bool [N, S, S] -> bool [N, S, S]."""
    per_clip = masks.new_zeros(clips, *masks.shape[1:], dtype=torch.int32)
    per_clip = per_clip.index_add(0, object_to_clip, masks.to(torch.int32))
    return per_clip[object_to_clip] > masks.to(torch.int32)
