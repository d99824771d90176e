"""Which of several candidate masks is taken where a prompt is ambiguous."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medsam2.model.tracker import Tracker

BEYOND = 1e4  # any predicted IoU is far smaller


@contextmanager
def chosen_candidate(tracker: Tracker, choice: Literal["best", "first"]) -> Iterator[None]:
    """Inside, `tracker` takes the candidate with the highest predicted IoU ("best", its own way) or always the first.

    "first" lowers the predicted IoUs of the later candidates, wherever the decoder's are compared: of the three masks
    of an ambiguous prompt, and of those that replace an unstable single mask.
    """
    if choice == "best":
        yield
        return
    handle = tracker.sam.sam_mask_decoder.iou_prediction_head.register_forward_hook(_first_wins)
    try:
        yield
    finally:
        handle.remove()


def _first_wins(module: nn.Module, given: tuple[Any, ...], ious: Tensor) -> Tensor:
    """ious [N, 4]: of the single mask, then of the three candidates."""
    return torch.cat([ious[:, :2], ious[:, 2:] - BEYOND], 1)
