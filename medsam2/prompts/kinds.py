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
    """Prompts of N objects on one frame: either points (a box is two points) or masks.

    Attributes:
        points: float [N, P, 2], (x, y) in pixels of the model input, or None.
        labels: int32 [N, P], or None: 1 positive, 0 negative, -1 padding, 2 top left and 3 bottom right of a box.
        masks: bool [N, 1, S, S], which become the frame's output, or None.

    Raises:
        ValueError: there are points without labels, or both or neither of points and masks.
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
        """Convert boxes [N, 4] (x0, y0, x1, y1), in pixels of the model input, to points."""
        # `arange` creates the labels on the device; a tensor of Python numbers would be copied there synchronously.
        corners = torch.arange(BOX_TOP_LEFT, BOX_BOTTOM_RIGHT + 1, dtype=torch.int32, device=boxes.device)
        return cls(points=boxes.reshape(-1, 2, 2), labels=corners.expand(len(boxes), 2))

    def with_points(self, points: Tensor, labels: Tensor) -> Prompts:
        """Append points [N, P, 2] with labels [N, P], for example correction clicks."""
        if self.points is None or self.labels is None:
            return Prompts(points=points, labels=labels)
        return Prompts(torch.cat([self.points, points], 1), torch.cat([self.labels, labels], 1))

    def hide_absent(self, masks: Tensor) -> Prompts:
        """Set the labels of objects that are absent from masks bool [N, S, S] to padding."""
        if self.points is None or self.labels is None:
            return self
        present = masks.flatten(1).any(1, keepdim=True)
        return Prompts(points=self.points, labels=torch.where(present, self.labels, PADDING))


Simulate = Callable[["Scene", "PromptSettings"], Prompts]
INITIAL_KINDS: dict[str, Simulate] = {}
"""The kinds of initial prompts in training, by name; `medsam2.prompts.initial` registers them."""
