"""What the formats of graphs share (ONNX, torch.export): which graphs there are, their settings, script and card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from medsam2.export.card import card
from medsam2.export.onnx_check import verify_graphs
from medsam2.export.onnx_parts import Part, parts_of, settings_of
from medsam2.export.run import file_stem, write_export, write_text
from medsam2.export.targets import ExportResult
from medsam2.export.verify import ReferenceClip
from medsam2.model.build import LoadedModel
from medsam2.pixels import IMAGENET_MEAN, IMAGENET_STD

SCRIPT = "propagate.py"
PARTS = {
    "encoder": "`image` -> `high_res_feats_0, high_res_feats_1, image_embed`",
    "decoder": "those and prompts -> `masks, iou_predictions`: what annotation tools take beside the encoder",
    "tracker": "the decoder with all candidates, object pointers and the object score, for following",
    "memory_encoder": "a frame and its mask -> a memory",
    "memory_attention": "a frame and its memories -> the features that the tracker looks at",
}


@dataclass(frozen=True)
class GraphFormat:
    """A way to keep graphs in files.

    Attributes:
        target: its name on the command line. ending: of the files.
        write: one graph into a file of that name. usage: lines for the card, with {stem}, {side}, {low}, {mean}, {std}.
        more: files beside the graphs and what they are, for the card; `write_more` writes them.
    """

    target: str
    ending: str
    write: Callable[[Part, Path], None]
    usage: str
    more: Mapping[str, str] = field(default_factory=dict)
    write_more: Callable[[LoadedModel, Path], None] | None = None


def export_graphs(
    form: GraphFormat,
    checkpoint: str | Path | LoadedModel,
    out: Path | str,
    force: bool,
    verify: bool,
    case: str | ReferenceClip | None,
    scores: Path | None,
) -> ExportResult:
    """Five graphs in the format `form`; the rest as of `run.write_export`."""

    def describe(loaded: LoadedModel, found: Mapping[str, Any] | None) -> str:
        return _card(form, loaded, found, scores)

    return write_export(checkpoint, out, force, verify, case, scores, partial(_write, form), verify_graphs, describe)


def _write(form: GraphFormat, loaded: LoadedModel, folder: Path) -> None:
    """All graphs, their settings, and the script that uses them."""
    stem = file_stem(loaded)
    for part in parts_of(loaded):
        form.write(part, folder / f"{stem}_{part.name}.{form.ending}")
    write_text(folder / f"{stem}.json", json.dumps(settings_of(loaded), indent=2) + "\n")
    shutil.copyfile(Path(__file__).with_name(SCRIPT), folder / SCRIPT)
    if form.write_more:
        form.write_more(loaded, folder)


def _card(form: GraphFormat, loaded: LoadedModel, found: Mapping[str, Any] | None, scores: Path | None) -> str:
    """README.md of a folder of graphs."""
    stem, side = file_stem(loaded), loaded.spec.image_size
    files = {f"{stem}_{name}.{form.ending}": what for name, what in PARTS.items()}
    files |= {
        f"{stem}.json": "sizes, normalisation and the numbers of the memory bank",
        SCRIPT: "follows objects through a volume or video with these graphs",
        **form.more,
        "verify.json": "what the check measured",
    }
    said = form.usage.format(stem=stem, side=side, low=side // 4, mean=list(IMAGENET_MEAN), std=list(IMAGENET_STD))
    if found:
        said += "\nLargest difference of each graph from the network, relative to its largest output: "
        said += ", ".join(f"{name} {value:.1g}" for name, value in found["graphs"].items()) + ".\n"
    return card(form.target, loaded, found, scores, files=files, usage=said)
