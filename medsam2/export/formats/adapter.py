"""The adapter of a run in peft's format: megabytes that plain peft loads onto the base that they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medsam2.adaptation.adapter import WEIGHTS, read_record, restore_adapted, save_adapter
from medsam2.adaptation.lora import adapter_names, base_state, is_adapted, official_name
from medsam2.errors import UserError
from medsam2.export.formats.exporter import Exporter, shareable
from medsam2.export.formats.sam2 import Sam2Exporter
from medsam2.export.verify.run import Consumer
from medsam2.model.build import LoadedModel, build_sam
from medsam2.model.checkpoint import read_checkpoint

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base


class AdapterExporter(Exporter):
    """peft's two files, and medsam2.json, which names the base."""

    title, library, tags = "peft", "peft", ("lora",)

    def supports(self, model: LoadedModel) -> bool:
        return model.provenance.adapter is not None

    def build(self, model: LoadedModel, folder: Path) -> None:
        stated = model.provenance
        if stated.dtype or stated.trained_image_size or (stated.weights or "").startswith("of the last step"):
            raise UserError(
                "--to adapter writes the adapter as the checkpoint has it: leave out --weights raw, --dtype and "
                "--image-size."
            )
        sam = read_adapted(model)
        save_adapter(folder, sam, shareable(model).model_copy(update={"adapter": stated.adapter}))

    def load_as_consumer(self, model: LoadedModel, folder: Path, scratch: Path) -> Consumer:
        """Plain peft on Meta's network.

        What was trained in full is wiped from the base first, so that it can come from the adapter's files alone.
        """
        sam = read_adapted(model)
        base, state = build_sam(model.spec), base_state(sam)
        adapters = adapter_names([name for name, _ in sam.named_parameters()])
        for name, parameter in sam.named_parameters():
            if parameter.requires_grad and name not in adapters:
                state[official_name(name)] = torch.zeros_like(parameter)
        base.load_state_dict(state)
        base_model, meta = LoadedModel(base, model.spec, source=model.source), Sam2Exporter()
        meta.build(base_model, scratch)
        files = meta.load_as_consumer(base_model, scratch, scratch).files
        loaded = "by plain peft onto Meta's network in a process without medsam2"
        return Consumer("peft", "sam2_consumer.py", (*files, folder), loaded)

    def describe(self, model: LoadedModel, folder: Path) -> dict[str, Any]:
        adapter = read_record(folder).adapter
        assert adapter is not None and adapter.adaptation.peft is not None, "`build` has written both"
        megabytes = (folder / WEIGHTS).stat().st_size / 1e6
        return {"method": adapter.adaptation.peft.method_name, "base": adapter.base, "megabytes": megabytes}


def read_adapted(model: LoadedModel) -> SAM2Base:
    """The network of the run that wrote `model.source`, with the adapter still apart.

    Raises:
        UserError: the run had no adapter.
    """
    path = Path(model.source)
    checkpoint = read_checkpoint(path) if path.is_file() else None
    if checkpoint is None or not is_adapted(checkpoint.state):
        raise UserError(
            f"{path} has no adapter: it holds a whole model. Export it with --to sam2, or train with an adapter "
            "(adaptation=lora_encoder)."
        )
    sam = build_sam(model.spec)
    restore_adapted(sam, checkpoint.state, checkpoint.provenance, str(path))
    return sam.eval()
