"""ONNX: the graphs of annotation tools, and those with which a volume is followed without PyTorch."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from medsam2.errors import UserError
from medsam2.export.card import card
from medsam2.export.onnx_check import verify_graphs
from medsam2.export.onnx_parts import Part, parts_of, settings_of
from medsam2.export.run import file_stem, write_export, write_text
from medsam2.export.targets import ExportResult
from medsam2.export.verify import ReferenceClip
from medsam2.model.build import LoadedModel

TARGET = "onnx"  # encoder and decoder for annotation tools, memory graphs and propagate.py without PyTorch

OPSET = 18
LIMIT = 2 * 1000**3  # bytes of weights in one file; protobuf ends at 2 GiB
SCRIPT = "propagate.py"
PARTS = {
    "encoder": "`image` -> `high_res_feats_0, high_res_feats_1, image_embed`",
    "decoder": "those and prompts -> `masks, iou_predictions`: what annotation tools take beside the encoder",
    "tracker": "the decoder with all candidates, object pointers and the object score, for following",
    "memory_encoder": "a frame and its mask -> a memory",
    "memory_attention": "a frame and its memories -> the features that the tracker looks at",
}
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
    """Write five graphs, their settings, `propagate.py`, README.md and verify.json into `out`.

    Raises:
        UserError: onnx or onnxscript is not installed, `out` is not empty (without `force`), the weights do not fit one
            file, or the graphs do not give our masks.
    """
    _refuse_missing()

    def describe(loaded: LoadedModel, found: Mapping[str, Any] | None) -> str:
        return graph_card(TARGET, "onnx", loaded, found, scores, USAGE)

    def build(loaded: LoadedModel, folder: Path) -> None:
        write_graphs(loaded, folder, "onnx", write_onnx)

    return write_export(checkpoint, out, force, verify, case, build, verify_graphs, describe)


def write_graphs(loaded: LoadedModel, folder: Path, ending: str, write: Callable[[Part, Path], None]) -> None:
    """All graphs by `write`, their settings, and the script that uses them."""
    stem = file_stem(loaded)
    for part in parts_of(loaded):
        write(part, folder / f"{stem}_{part.name}.{ending}")
    write_text(folder / f"{stem}.json", json.dumps(settings_of(loaded), indent=2) + "\n")
    shutil.copyfile(Path(__file__).with_name(SCRIPT), folder / SCRIPT)


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


def graph_card(
    target: str, ending: str, loaded: LoadedModel, found: Mapping[str, Any] | None, scores: Path | None, usage: str
) -> str:
    """README.md of a folder of graphs."""
    from medsam2.pixels import IMAGENET_MEAN, IMAGENET_STD

    stem, side = file_stem(loaded), loaded.spec.image_size
    files = {f"{stem}_{name}.{ending}": what for name, what in PARTS.items()}
    files |= {
        f"{stem}.json": "sizes, normalisation and the numbers of the memory bank",
        SCRIPT: "follows objects through a volume or video with these graphs",
        "verify.json": "what the check measured",
    }
    said = usage.format(stem=stem, side=side, low=side // 4, mean=list(IMAGENET_MEAN), std=list(IMAGENET_STD))
    if found:
        said += "\nLargest difference of each graph from the network, relative to its largest output: "
        said += ", ".join(f"{name} {value:.1g}" for name, value in found["graphs"].items()) + ".\n"
    return card(target, loaded, found, scores, files=files, usage=said)


def _refuse_missing() -> None:
    import importlib.util

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(missing)}.")
