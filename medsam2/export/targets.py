"""Which formats there are; a new one is a file in `formats/` with its `Exporter`, and a row here."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medsam2.errors import UserError, check_choice

if TYPE_CHECKING:
    from medsam2.export.formats.exporter import Exporter

ALL = "all"


@dataclass(frozen=True)
class Target:
    """A format: one line about it, and its exporter ("module:class"), imported only when it is asked for."""

    summary: str
    path: str

    def exporter(self) -> Exporter:
        """A new exporter of the format."""
        module, name = self.path.split(":")
        exporter: Exporter = getattr(importlib.import_module(f"medsam2.export.formats.{module}"), name)()
        return exporter


TARGETS = {
    "adapter": Target(
        "the run's LoRA (or other) adapter in peft's format, without the base weights", "adapter:AdapterExporter"
    ),
    "huggingface": Target(
        "folder for transformers (Sam2VideoModel, Sam2Model) with processor and model card",
        "huggingface:HuggingFaceExporter",
    ),
    "onnx": Target(
        "encoder and decoder for annotation tools, memory graphs and propagate.py without PyTorch",
        "graphs:OnnxExporter",
    ),
    "sam2": Target("official .pt and yaml for Meta's code and the tools built on it", "sam2:Sam2Exporter"),
    "torch": Target(
        "torch.export programs (.pt2) of the same graphs, and propagate.py that runs them", "graphs:TorchExporter"
    ),
}


def describe_targets() -> str:
    """All formats in one line, for a help text."""
    return "; ".join(f"{name} ({target.summary})" for name, target in TARGETS.items())


def split_names(values: Sequence[str]) -> list[str]:
    """The formats of `--to A --to B` or `--to A,B`, each once; ["all"] for a release.

    Raises:
        UserError: an unknown format, or "all" beside others.
    """
    names = list(dict.fromkeys(name.strip() for value in values for name in value.split(",") if name.strip()))
    if ALL in names and len(names) > 1:
        raise UserError(f"--to all is every format; leave out {', '.join(name for name in names if name != ALL)}.")
    for name in names:
        check_choice("--to", name, (*TARGETS, ALL))
    return names
