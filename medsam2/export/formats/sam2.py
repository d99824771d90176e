"""The official SAM 2 format: `.pt` + self-contained yaml, which Meta's code and the tools built on it load."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from medsam2.export.formats.exporter import Exporter, file_stem, shareable
from medsam2.export.verify.run import Consumer
from medsam2.files import atomic_write, write_text
from medsam2.model.build import LoadedModel, model_config


class Sam2Exporter(Exporter):
    """`medsam2_{size}_{px}.pt`, and the yaml of the same stem."""

    title, library = "Meta's code and the tools built on it", "sam2"

    def build(self, model: LoadedModel, folder: Path) -> None:
        stem = file_stem(model)
        dtype = torch.bfloat16 if model.provenance.dtype == "bf16" else torch.float32
        state = {key: value.detach().cpu().to(dtype).contiguous() for key, value in model.sam.state_dict().items()}
        # Beside the weights only plain values, or no consumer could unpickle the file.
        with atomic_write(folder / f"{stem}.pt") as file:
            torch.save({"model": state, "medsam2": shareable(model).to_dict()}, file)
        # Under `model` at the root of Hydra's tree, as in the package's own yaml files.
        text = yaml.safe_dump({"model": model_config(model.spec)}, sort_keys=False)
        title = f"{model.spec.name} {model.spec.version}, {model.spec.image_size} px"
        write_text(folder / f"{stem}.yaml", f"# @package _global_\n# {title}\n{text}")

    def load_as_consumer(self, model: LoadedModel, folder: Path, scratch: Path) -> Consumer:
        stem = file_stem(model)
        loaded = "strictly, by sam2.build_sam of Meta's code in a process without medsam2"
        return Consumer("Meta's code", "sam2_consumer.py", (folder / f"{stem}.yaml", folder / f"{stem}.pt"), loaded)
