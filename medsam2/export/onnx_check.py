"""Do exported graphs give our masks? They are run in a process of their own, and compared.

Each graph is held against the module that it was made from; the decoder that annotation tools use, against our tracker
on one picture; and `propagate.py` against our predictor on a clip (`expected`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medsam2.errors import UserError
from medsam2.export.expected import Item, compared, items_of, run_consumer, together
from medsam2.export.onnx_parts import Part, parts_of
from medsam2.export.verify import AGREEMENT, ReferenceClip
from medsam2.model.build import LoadedModel

GRAPH = 1e-5
"""A graph's output may differ by so much of its largest value (of 1, where that is less)."""
LOGITS = 0.01
"""Mask logits may differ by so much at the end of a clip; their masks (logits above 0) must overlap by `AGREEMENT`."""
CONSUMER = Path(__file__).with_name("onnx_consumer.py")


def verify_graphs(ours: LoadedModel, folder: Path, clip: ReferenceClip) -> dict[str, Any]:
    """Run the graphs of `folder` as their user does, and compare.

    Returns:
        JSON values of `expected.together`, and under "graphs" the largest difference of each graph's outputs, relative
        to their largest value.

    Raises:
        UserError: the graphs do not run without us, or what they give is not ours.
    """
    graphs = [item for part in parts_of(ours) for item in graph_items(part)]
    seen = items_of(ours, clip, torch.float32)
    shared = {"frames": torch.from_numpy(_channels_last(clip.frames))}
    answers = run_consumer(CONSUMER, [folder], [*graphs, *seen], shared)
    relative: dict[str, float] = {}
    for item, answer in zip(graphs, answers, strict=False):
        given = [answer[str(place)] for place in range(len(item.expected))]
        worst = max(map(relative_difference, given, item.expected))
        relative[item.name] = max(worst, relative.get(item.name, 0.0))
    found = compared(seen, answers[len(graphs) :], clip)
    tail = "nothing was written. Please report it with the run's config.yaml; --no-verify writes all the same."
    for name, difference in relative.items():
        if not difference <= GRAPH:
            raise UserError(
                f"export of {ours.source}: the graph {name} differs from the network by {difference:.3g} of its "
                f"largest output (at most {GRAPH} is allowed); {tail}"
            )
    for item, one in zip(seen, found, strict=True):
        if not (one.passed and one.max_logit_difference <= LOGITS):
            raise UserError(
                f"export of {ours.source}: {item.name} on {clip.name}: the graphs' masks overlap ours by {one.iou:.4f} "
                f"(at least {AGREEMENT} is asked), logits differ by {one.max_logit_difference:.3g} (at most {LOGITS}); "
                f"{tail}"
            )
    return {
        **together(seen, found),
        "loaded": "in a process without medsam2" + (" and PyTorch" if any(folder.glob("*.onnx")) else ""),
        "tolerances": {"graphs": GRAPH, "logits": LOGITS, "iou": AGREEMENT},
        "graphs": relative,
    }


def relative_difference(given: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest value (at least 1); infinite for another shape or NaN."""
    if given.shape != expected.shape:
        return math.inf
    difference = float((given - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    return difference if math.isfinite(difference) else math.inf


def _channels_last(frames: Tensor) -> np.ndarray:
    """uint8 [T, C, H, W] as [T, H, W] or [T, H, W, 3]."""
    values = frames.numpy()
    return values[:, 0] if values.shape[1] == 1 else np.ascontiguousarray(np.moveaxis(values, 1, -1))


def graph_items(part: Part) -> list[Item]:
    """The example that a graph was made from, and one with every free size at 1."""
    asked = {"kind": "graph", "part": part.name}
    items = []
    for inputs in [part.inputs, smallest(part)] if part.dynamic else [part.inputs]:
        with torch.no_grad():
            found = part.module(*inputs.values())
        tensors = {name: value.contiguous() for name, value in inputs.items()}
        items.append(Item(part.name, asked, tensors, found if isinstance(found, tuple) else (found,)))
    return items


def smallest(part: Part) -> dict[str, Tensor]:
    """Inputs with every free size at 1."""
    cut = {name: [slice(1) if axis in part.dynamic.get(name, {}) else slice(None) for axis in range(value.ndim)]
           for name, value in part.inputs.items()}  # fmt: skip
    return {name: value[tuple(cut[name])] for name, value in part.inputs.items()}
