"""What a user says about objects on frames, and what comes back.

Legend: N objects, T frames, H and W pixels of the given frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from medsam2.prompts.kinds import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT


@dataclass(frozen=True, eq=False)
class FramePrompt:
    """What a user says about one object on one frame: a box and or points, or else a mask.

    Several for the same frame and object are rounds of correction, in the order given: points add up, and each round
    sees the mask of the one before.

    Attributes:
        frame: index in the clip. object: 0 to N - 1.
        box: (x0, y0, x1, y1) in pixels of the given frames.
        points: float [P, 2] of (x, y), likewise. labels: int [P], 1 on the object, 0 off it.
        mask: bool [H, W], taken as the frame's mask.
    """

    frame: int
    object: int
    box: tuple[float, float, float, float] | None = None
    points: np.ndarray | None = None
    labels: np.ndarray | None = None
    mask: np.ndarray | None = None

    def __post_init__(self) -> None:
        pointed = self.box is not None or self.points is not None
        if pointed == (self.mask is not None):
            raise ValueError("a prompt is either a box and or points, or a mask")
        if (self.points is None) != (self.labels is None):
            raise ValueError("points and labels come together")

    def as_points(self) -> tuple[np.ndarray, np.ndarray]:
        """Points [P, 2] and labels [P], a box as its two corners first."""
        points, labels = np.zeros((0, 2), np.float32), np.zeros(0, np.int32)
        if self.box is not None:
            points = np.asarray(self.box, np.float32).reshape(2, 2)
            labels = np.asarray([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT], np.int32)
        if self.points is not None:
            points = np.concatenate([points, np.asarray(self.points, np.float32).reshape(-1, 2)])
            labels = np.concatenate([labels, np.asarray(self.labels, np.int32).reshape(-1)])
        return points, labels


@dataclass(frozen=True, eq=False)
class FrameResult:
    """One visited frame: the objects seen there, their logits [n, H, W] and object scores [n] (logits)."""

    frame: int
    objects: tuple[int, ...]
    logits: Tensor
    scores: Tensor


@dataclass(frozen=True, eq=False)
class Prediction:
    """Masks of all objects, on the CPU.

    Attributes:
        masks: bool [N, T, H, W]; empty on frames that the direction does not reach.
        scores: float32 [N, T], logit of "the object is here"; NaN on frames not reached.
        logits: float32 [N, T, H, W] if asked for, else None; -1024 where not reached or absent.
        encoded: number of frames that went through the image encoder.
    """

    masks: Tensor
    scores: Tensor
    logits: Tensor | None
    encoded: int


def check_prompts(prompts: Sequence[FramePrompt], length: int) -> None:
    """Objects are numbered without gaps, and frames exist.

    Raises:
        ValueError: they are not, or do not.
    """
    check_frames(prompts, length)
    objects = {prompt.object for prompt in prompts}
    if not objects or objects != set(range(max(objects) + 1)):
        raise ValueError(f"objects are numbered from 0 without gaps and each needs a prompt; found {sorted(objects)}")


def check_frames(prompts: Sequence[FramePrompt], length: int) -> None:
    """Raises ValueError for a prompt on a frame that does not exist."""
    for prompt in prompts:
        if not 0 <= prompt.frame < length:
            raise ValueError(f"a prompt is on frame {prompt.frame}, but the frames are 0 to {length - 1}")


def by_frame(prompts: Sequence[FramePrompt]) -> dict[int, dict[int, list[FramePrompt]]]:
    """Prompts by frame and object, in the order given."""
    rounds: dict[int, dict[int, list[FramePrompt]]] = {}
    for prompt in prompts:
        rounds.setdefault(prompt.frame, {}).setdefault(prompt.object, []).append(prompt)
    return rounds
