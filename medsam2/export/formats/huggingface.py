"""The Hugging Face format: a folder that `Sam2VideoModel`, `Sam2Model` and their processors load by its path."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from medsam2.errors import UserError
from medsam2.export.formats.exporter import Exporter, shareable
from medsam2.export.formats.huggingface_config import write_configs
from medsam2.export.formats.huggingface_keys import to_huggingface
from medsam2.export.verify.run import Consumer
from medsam2.files import atomic_write
from medsam2.model.build import LoadedModel

TARGET = "huggingface"  # folder for transformers (Sam2VideoModel, Sam2Model) with processor and model card

MAX_LOGIT_DIFFERENCE = 0.01
"""Memories are kept in bfloat16 on both sides, so that one rounding on the way of a clip shows here; the masks (logits
above 0) must agree all the same."""
MIN_IOU_FROM_MASK = 0.9
"""transformers treats a mask prompt in two ways unlike Meta's predictor and ours: it keeps the mask in memory at the
whole side instead of a quarter (other pixels on the outline), and makes the object pointer from the best of three
candidates instead of the single mask. Logits then differ by tenths in any case."""


class HuggingFaceExporter(Exporter):
    """Configurations and weights, as transformers' own `save_pretrained` would name them."""

    title, library, tags = "transformers (`Sam2VideoModel`, `Sam2Model`)", "transformers", ("safetensors",)

    def build(self, model: LoadedModel, folder: Path) -> None:
        from safetensors.torch import save

        try:
            write_configs(folder, model.spec)
        except ImportError as error:
            raise UserError(
                f"the installed transformers has no SAM 2 ({error}): pip install 'transformers>=4.56'."
            ) from None
        # Readers compute in float32 either way: config.json asks for it.
        dtype = torch.bfloat16 if model.provenance.dtype == "bf16" else torch.float32
        state = {key: value.detach().cpu().to(dtype) for key, value in model.sam.state_dict().items()}
        tensors = {key: value.contiguous() for key, value in to_huggingface(state).items()}
        header = {"format": "pt", "medsam2": json.dumps(shareable(model).to_dict(), sort_keys=True)}
        with atomic_write(folder / "model.safetensors") as file:
            file.write(save(tensors, metadata=header))

    def load_as_consumer(self, model: LoadedModel, folder: Path, scratch: Path) -> Consumer:
        return Consumer(
            "transformers",
            "huggingface_consumer.py",
            (folder,),
            "strictly, by transformers in a process without medsam2",
            max_logit_difference=MAX_LOGIT_DIFFERENCE,
            min_iou_from_mask=MIN_IOU_FROM_MASK,
        )
