"""A protocol is data; this turns it and the ground truth of one object into prompts."""

from __future__ import annotations

import numpy as np

from medsam2.evaluation.predictor import FramePrompt
from medsam2.evaluation.settings import ProtocolSettings
from medsam2.prompts.strategies import component_points, select_frames, tight_box

MOST_CLICKS = 3


def apply(protocol: ProtocolSettings, mask: np.ndarray, index: int = 0) -> list[FramePrompt]:
    """The prompts for one object from its ground truth.

    Args:
        mask: bool [T, H, W], not empty everywhere.
        index: the object's number among those predicted together.

    Raises:
        ValueError: the object is on no frame.
    """
    return [_prompt(protocol, mask[frame], frame, index) for frame in select_frames(mask, protocol.slices)]


def _prompt(protocol: ProtocolSettings, mask: np.ndarray, frame: int, index: int) -> FramePrompt:
    if protocol.prompt == "box":
        return FramePrompt(frame, index, box=tight_box(mask))
    if protocol.prompt == "mask":
        return FramePrompt(frame, index, mask=mask)
    points = component_points(mask, 1 if protocol.prompt == "click" else MOST_CLICKS)
    return FramePrompt(frame, index, points=points, labels=np.ones(len(points), dtype=np.int32))
