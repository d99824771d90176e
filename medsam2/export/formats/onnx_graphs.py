"""ONNX: the graphs of annotation tools, and those with which a volume is followed without PyTorch."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml

from medsam2.errors import UserError
from medsam2.export.formats.exporter import file_stem
from medsam2.export.formats.graphs import GraphExporter, Part
from medsam2.files import write_text
from medsam2.model.build import LoadedModel

TARGET = "onnx"  # encoder and decoder for annotation tools, memory graphs and propagate.py without PyTorch

OPSET = 18
MAX_FILE_BYTES = 2 * 1000**3  # of weights; protobuf ends at 2 GiB


class OnnxExporter(GraphExporter):
    """Five graphs, and yaml files with which annotation programs load encoder and decoder as a custom model."""

    title, library, tags = "ONNX Runtime, without PyTorch", "onnxruntime", ("onnx",)
    ending, consumer = "onnx", "ONNX Runtime"

    def build(self, model: LoadedModel, folder: Path) -> None:
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(missing)}.")
        super().build(model, folder)
        for name, content in annotation_tools(model).items():
            write_text(folder / name, yaml.safe_dump(content, sort_keys=False))

    def write(self, part: Part, path: Path) -> None:
        """One file, opset 18, weights inside."""
        size = sum(value.numel() * value.element_size() for value in part.module.state_dict().values())
        if size > MAX_FILE_BYTES:
            raise UserError(f"{path.name}: {size / 1e9:.1f} GB of weights do not fit one ONNX file (2 GB).")
        # torch prints progress, and advice for the authors of the network.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
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


def annotation_tools(model: LoadedModel) -> dict[str, dict[str, Any]]:
    """Contents of the yaml files, with the keys that X-AnyLabeling 4.2 and AnyLabeling 0.4 read."""
    stem, spec, side = file_stem(model), model.spec, model.spec.image_size
    graphs = {
        "name": stem,
        "display_name": f"medsam2 {spec.name} ({side} px)",
        "encoder_model_path": f"{stem}_encoder.onnx",
        "decoder_model_path": f"{stem}_decoder.onnx",
    }
    # Of "segment everything": the program's own thresholds (0.8, 0.95) drop what medical images show faintly.
    grid = {"amg_pred_iou_thresh": 0.6, "amg_stability_score_thresh": 0.8}
    # These have to be there; the program reads the side from the encoder all the same.
    sizes = {"input_size": side, "max_width": side, "max_height": side}
    return {
        "x-anylabeling.yaml": {"type": "segment_anything_2", **graphs, **grid},
        "anylabeling.yaml": {"type": "segment_anything", **graphs, **sizes},
    }
