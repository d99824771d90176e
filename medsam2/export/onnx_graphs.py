"""ONNX: the graphs of annotation tools, and those with which a volume is followed without PyTorch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path

import torch

from medsam2.errors import UserError
from medsam2.export.annotation_tools import FILES, write_annotation_tools
from medsam2.export.graphs import GraphFormat, export_graphs
from medsam2.export.onnx_parts import Part
from medsam2.export.targets import ExportResult
from medsam2.export.verify import ReferenceClip
from medsam2.model.build import LoadedModel

TARGET = "onnx"  # encoder and decoder for annotation tools, memory graphs and propagate.py without PyTorch

OPSET = 18
LIMIT = 2 * 1000**3  # bytes of weights in one file; protobuf ends at 2 GiB
USAGE = """With `pip install onnxruntime numpy`, from this folder. One picture; annotation tools do the same:

```python
import numpy as np
import onnxruntime

encoder = onnxruntime.InferenceSession("{stem}_encoder.onnx")
decoder = onnxruntime.InferenceSession("{stem}_decoder.onnx")
image = np.zeros((1, 3, {side}, {side}), np.float32)  # RGB / 255, minus {mean}, over {std}
high_0, high_1, embed = encoder.run(None, {{"image": image}})
box = np.array([[[20, 20], [90, 80]]], np.float32)  # corners in pixels of the {side} x {side} picture
labels = np.array([[2, 3]], np.float32)  # 1 and 0 for clicks on and off the object
inputs = [embed, high_0, high_1, box, labels, np.zeros((1, 1, {low}, {low}), np.float32), np.zeros(1, np.float32)]
masks, ious = decoder.run(None, dict(zip([entry.name for entry in decoder.get_inputs()], inputs)))
mask = masks[0, ious[0].argmax()] > 0  # {low} x {low}: resize it to the picture
```

A volume or a video, both ways from the prompted frame:

```python
import json
from pathlib import Path
from propagate import graphs, propagate

settings = json.loads(Path("{stem}.json").read_text())
frames = np.zeros((5, 200, 240), np.uint8)  # or [T, H, W, 3]
prompts = [{{"object": 0, "frame": 2, "box": [20, 20, 90, 80]}}]
found = propagate(graphs(Path(".")), settings, frames, prompts)  # logits [objects, T, H, W] and scores
```

The same in a shell: `python propagate.py frames.npy prompts.json masks.npz`; `python propagate.py --help` has the keys.
"""


def export(
    checkpoint: str | Path | LoadedModel,
    out: Path | str,
    force: bool = False,
    verify: bool = True,
    case: str | ReferenceClip | None = None,
    scores: Path | None = None,
) -> ExportResult:
    """Write five graphs, settings, `propagate.py`, yaml for annotation tools, README.md and verify.json into `out`.

    Raises:
        UserError: onnx or onnxscript is not installed, `out` is not empty (without `force`), the weights do not fit one
            file, or the graphs do not give our masks.
    """
    _refuse_missing()
    form = GraphFormat(TARGET, "onnx", write_onnx, USAGE, FILES, write_annotation_tools)
    return export_graphs(form, checkpoint, out, force, verify, case, scores)


def write_onnx(part: Part, path: Path) -> None:
    """One file, opset 18, weights inside.

    Raises:
        UserError: the weights are larger than a file may be.
    """
    size = sum(value.numel() * value.element_size() for value in part.module.state_dict().values())
    if size > LIMIT:
        raise UserError(f"{path.name}: {size / 1e9:.1f} GB of weights do not fit one ONNX file (2 GB).")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # progress, and advice for its authors
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            part.program(),
            (),
            str(path),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            external_data=False,
            verbose=False,
        )


def _refuse_missing() -> None:
    import importlib.util

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(missing)}.")
