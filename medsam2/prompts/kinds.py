"""Prompt types shared by training, evaluation and prediction.

Legend: N objects, P points, S model input side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from medsam2.prompts.scene import Scene
    from medsam2.prompts.settings import PromptSettings

POSITIVE, NEGATIVE, PADDING, BOX_TOP_LEFT, BOX_BOTTOM_RIGHT = 1, 0, -1, 2, 3


@dataclass(frozen=True)
class Prompts:
    """Prompts of N objects on one frame; either points (boxes are two points) or masks, never both.

    Attributes:
        points: float [N, P, 2], (x, y) in pixels of the model input, or None.
        labels: int32 [N, P]: 1 positive, 0 negative, -1 padding, 2 and 3 the box's corners, or None.
        masks: bool [N, 1, S, S] masks taken as the frame's output, or None.
    """

    points: Tensor | None = None
    labels: Tensor | None = None
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.points is None) != (self.labels is None):
            raise ValueError("points and labels come together")
        if (self.points is None) == (self.masks is None):
            raise ValueError("give either points with labels, or masks")

    @classmethod
    def from_boxes(cls, boxes: Tensor) -> Prompts:
        """Boxes [N, 4] as x0, y0, x1, y1 in pixels of the model input."""
        # made on the device: a tensor of Python numbers would be copied there, and the host would wait for it
        corners = torch.arange(BOX_TOP_LEFT, BOX_BOTTOM_RIGHT + 1, dtype=torch.int32, device=boxes.device)
        return cls(points=boxes.reshape(-1, 2, 2), labels=corners.expand(len(boxes), 2))

    def with_points(self, points: Tensor, labels: Tensor) -> Prompts:
        """These prompts and more points [N, P, 2] with labels [N, P] (correction clicks)."""
        if self.points is None or self.labels is None:
            return Prompts(points=points, labels=labels)
        return Prompts(torch.cat([self.points, points], 1), torch.cat([self.labels, labels], 1))

    def hide_absent(self, masks: Tensor) -> Prompts:
        """These points with the labels of objects that have no pixel in masks bool [N, S, S] set to padding."""
        if self.points is None or self.labels is None:
            return self
        present = masks.flatten(1).any(1, keepdim=True)
        return Prompts(points=self.points, labels=torch.where(present, self.labels, PADDING))


Simulate = Callable[["Scene", "PromptSettings"], Prompts]
INITIAL_KINDS: dict[str, Simulate] = {}
"""The kinds of initial prompts in training, by name; `medsam2.prompts.initial` fills it."""
