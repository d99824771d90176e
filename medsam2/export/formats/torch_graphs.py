"""torch.export: the same graphs as programs that PyTorch runs without any Python code of the network."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from medsam2.export.formats.graphs import GraphExporter, Part

TARGET = "torch"  # torch.export programs (.pt2) of the same graphs, and propagate.py that runs them


class TorchExporter(GraphExporter):
    """Five programs."""

    title, library = "torch.export, without this package", "pytorch"
    ending, consumer = "pt2", "torch.export"

    def write(self, part: Part, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No complete tensor found in the group")  # all is on the CPU
            torch.export.save(part.program(), str(path))
