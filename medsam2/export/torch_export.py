"""torch.export: the same graphs as programs that PyTorch runs without any Python code of the network."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from medsam2.export.graphs import GraphFormat, export_graphs
from medsam2.export.onnx_parts import Part
from medsam2.export.targets import ExportResult
from medsam2.export.verify import ReferenceClip
from medsam2.model.build import LoadedModel

TARGET = "torch"  # torch.export programs (.pt2) of the same graphs, and propagate.py that runs them

USAGE = """With `pip install torch numpy` of the version that wrote them or a later one, from this folder. One picture:

```python
import torch

encoder = torch.export.load("{stem}_encoder.pt2").module()
decoder = torch.export.load("{stem}_decoder.pt2").module()
image = torch.zeros(1, 3, {side}, {side})  # RGB / 255, minus {mean}, over {std}
high_0, high_1, embed = encoder(image)
box = torch.tensor([[[20.0, 20.0], [90.0, 80.0]]])  # corners in pixels of the {side} x {side} picture
labels = torch.tensor([[2.0, 3.0]])  # 1 and 0 for clicks on and off the object
masks, ious = decoder(embed, high_0, high_1, box, labels, torch.zeros(1, 1, {low}, {low}), torch.zeros(1))
mask = masks[0, ious[0].argmax()] > 0  # {low} x {low}: resize it to the picture
```

A volume or a video, both ways from the prompted frame:

```python
import json
from pathlib import Path
import numpy as np
from propagate import graphs, propagate

settings = json.loads(Path("{stem}.json").read_text())
frames = np.zeros((5, 200, 240), np.uint8)  # or [T, H, W, 3]
prompts = [{{"object": 0, "frame": 2, "box": [20, 20, 90, 80]}}]
found = propagate(graphs(Path(".")), settings, frames, prompts)  # logits [objects, T, H, W] and scores
```

`.pt2` files are zip archives that `torch.export.load` reads; take them only from whom you trust, as any checkpoint.
"""


def export(
    checkpoint: str | Path | LoadedModel,
    out: Path | str,
    force: bool = False,
    verify: bool = True,
    case: str | ReferenceClip | None = None,
    scores: Path | None = None,
) -> ExportResult:
    """Write five programs, their settings, `propagate.py`, README.md and verify.json into `out`.

    Raises:
        UserError: `out` is not empty (without `force`), or the programs do not give our masks.
    """
    form = GraphFormat(TARGET, "pt2", write_program, USAGE)
    return export_graphs(form, checkpoint, out, force, verify, case, scores)


def write_program(part: Part, path: Path) -> None:
    """One program; parts of one table that share memory are stored once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")  # all is on the CPU
        torch.export.save(part.program(), str(path))
