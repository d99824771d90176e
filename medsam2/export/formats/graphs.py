"""ONNX and torch.export: the network taken apart into graphs that run without its Python code.

They wrap the modules of the `sam2` package. What a tracer cannot follow, or would compute anew for every picture, is
made once here: position encodings are constants, and the rotations of the memory attention are written with cosines
and sines instead of complex numbers.

Legend: S model input side, C hidden width, M memory width.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import shutil
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from medsam2.errors import UserError
from medsam2.export.formats.exporter import Exporter, file_stem
from medsam2.export.formats.graph_modules import Decoder, Encoder, MemoryAttention, MemoryEncoder, TrackingDecoder
from medsam2.export.verify.run import Consumer
from medsam2.files import write_text
from medsam2.model.build import LoadedModel, build_sam
from medsam2.pixels import IMAGENET_MEAN, IMAGENET_STD

SCRIPT = "propagate.py"
MAX_LOGIT_DIFFERENCE = 0.01  # of mask logits at the end of a clip
OPSET = 18
MAX_FILE_BYTES = 2 * 1000**3  # of weights in an ONNX file; protobuf ends at 2 GiB


Shape = tuple[int | str, ...]  # a word is a free size, for which the example has that of `EXAMPLE_SIZES`
EXAMPLE_SIZES = {"prompts": 2, "points": 3, "memories": 3, "pointers": 5}
MAX_SIZE = 4096  # of a free size


@dataclass(frozen=True, eq=False)
class Part:
    """One graph.

    Attributes:
        name: ends the file name. module: what is traced, without gradients, float32.
        inputs: shapes by name, in the order of the graph's inputs. outputs: names in order.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Shape]
    outputs: tuple[str, ...]

    def example(self, sizes: Mapping[str, int] = EXAMPLE_SIZES) -> dict[str, Tensor]:
        """Random inputs; the rows of temporal encodings are whole numbers from 0 to 2."""
        draw = torch.Generator().manual_seed(0)
        inputs = {}
        for name, shape in self.inputs.items():
            at = [sizes[size] if isinstance(size, str) else size for size in shape]
            rows = name == "memory_times"
            inputs[name] = torch.randint(0, 3, at, generator=draw) if rows else torch.randn(at, generator=draw)
        return inputs

    def program(self) -> torch.export.ExportedProgram:
        """What torch.export makes of it: the start of both formats."""
        named = {name: torch.export.Dim(name, min=1, max=MAX_SIZE) for name in EXAMPLE_SIZES}
        shapes = tuple(
            {axis: named[size] for axis, size in enumerate(shape) if isinstance(size, str)} or None
            for shape in self.inputs.values()
        )
        with torch.no_grad():
            return torch.export.export(
                self.module.eval(), tuple(self.example().values()), dynamic_shapes=shapes, strict=False
            )


class GraphExporter(Exporter):
    """Five graphs, their settings, and the script that follows objects with them; subclasses say how one is written."""

    ending: str  # of the files
    consumer: str  # for messages

    @abstractmethod
    def write(self, part: Part, path: Path) -> None:
        """Write one graph."""

    def build(self, model: LoadedModel, folder: Path) -> None:
        for part in parts_of(model):
            self.write(part, folder / f"{file_stem(model)}_{part.name}.{self.ending}")
        write_text(folder / f"{file_stem(model)}.json", json.dumps(settings_of(model), indent=2) + "\n")
        shutil.copyfile(Path(__file__).with_name(SCRIPT), folder / SCRIPT)

    def load_as_consumer(self, model: LoadedModel, folder: Path, scratch: Path) -> Consumer:
        return Consumer(
            self.consumer,
            "graphs_consumer.py",
            (folder,),
            "in a process without medsam2" + (" and PyTorch" if self.ending == "onnx" else ""),
            memory_dtype=torch.float32,
            max_logit_difference=MAX_LOGIT_DIFFERENCE,
        )


class TorchExporter(GraphExporter):
    """Five programs that PyTorch runs without any Python code of the network."""

    title, library = "torch.export, without this package", "pytorch"
    ending, consumer = "pt2", "torch.export"

    def write(self, part: Part, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No complete tensor found in the group")  # all is on the CPU
            torch.export.save(part.program(), str(path))


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


def parts_of(model: LoadedModel) -> tuple[Part, ...]:
    """The five graphs: encoder and decoder as annotation tools bind them, and three for following through a volume."""
    sam = _traceable(model)
    side, cells, width = sam.image_size, sam.image_size // 16, sam.hidden_dim
    embed: dict[str, Shape] = {"image_embed": (1, width, cells, cells)}
    high: dict[str, Shape] = {
        "high_res_feats_0": (1, width // 8, 4 * cells, 4 * cells),
        "high_res_feats_1": (1, width // 4, 2 * cells, 2 * cells),
    }

    def prompts(count: int | str) -> dict[str, Shape]:
        return {
            "point_coords": (count, "points", 2),
            "point_labels": (count, "points"),
            "mask_input": (count, 1, 4 * cells, 4 * cells),
            "has_mask_input": (count,),
        }

    masks: dict[str, Shape] = {
        "mask_logits": (1, 1, 4 * cells, 4 * cells), "object_score_logits": (1, 1), "prompted": (1,)
    }  # fmt: skip
    memory: dict[str, Shape] = {
        "memories": ("memories", sam.mem_dim, cells, cells),
        "memory_times": ("memories",),
        "pointers": ("pointers", width),
        "pointer_times": ("pointers",),
    }
    answers = ("masks", "iou_predictions")
    tracked = (*answers, "object_pointers", "object_score_logits")
    return (
        Part("encoder", Encoder(sam), {"image": (1, 3, side, side)}, (*high, *embed)),
        Part("decoder", Decoder(sam), {**embed, **high, **prompts("prompts")}, answers),
        Part("tracker", TrackingDecoder(sam), {**embed, **high, **prompts(1)}, tracked),
        Part("memory_encoder", MemoryEncoder(sam), {**embed, **masks}, ("memory",)),
        Part("memory_attention", MemoryAttention(sam), {**embed, **memory}, ("conditioned",)),
    )


def settings_of(model: LoadedModel) -> dict[str, Any]:
    """What `propagate.py` has to know beside the graphs, as JSON values."""
    sam: Any = model.sam
    return {
        "model": f"{model.spec.name} {model.spec.version}",
        "image_size": model.spec.image_size,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "no_memory": sam.no_mem_embed.detach().flatten().tolist(),
        "mask_downsample": {
            "weight": sam.mask_downsample.weight.detach()[0, 0].tolist(),
            "bias": float(sam.mask_downsample.bias.detach()),
        },
    }


def _traceable(model: LoadedModel) -> Any:
    """A network of its own with the same weights: that of a tracker has products that are no standard operations."""
    sam: Any = build_sam(model.spec)
    sam.load_state_dict(model.sam.state_dict())
    sam = sam.float().eval().requires_grad_(False)
    cells = model.spec.embedding_side
    trunk, neck = sam.image_encoder.trunk, sam.image_encoder.neck
    grid = torch.zeros(1, sam.hidden_dim, cells, cells)
    sam.image_place = neck.position_encoding(grid).detach()
    sam.memory_place = sam.memory_encoder.position_encoding(grid[:, : sam.mem_dim]).detach()
    neck.position_encoding = sam.memory_encoder.position_encoding = nn.Identity()  # its output is not looked at
    trunk.register_buffer("place", trunk._get_pos_embed((model.spec.image_size // 4,) * 2).detach())
    trunk._get_pos_embed = lambda _size: trunk.place
    return sam


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
