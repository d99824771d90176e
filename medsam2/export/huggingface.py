"""The Hugging Face format: a folder that `Sam2VideoModel`, `Sam2Model` and their processors load by its path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from medsam2.errors import UserError
from medsam2.export.card import card
from medsam2.export.huggingface_check import verify_huggingface
from medsam2.export.huggingface_config import write_configs
from medsam2.export.huggingface_keys import to_huggingface
from medsam2.export.run import primitives, write_export
from medsam2.export.targets import ExportResult
from medsam2.export.verify import ReferenceClip
from medsam2.files import atomic_write
from medsam2.model.build import LoadedModel

TARGET = "huggingface"  # folder for transformers (Sam2VideoModel, Sam2Model) with processor and model card

FILES = {
    "config.json": "the network, for `Sam2VideoModel` and `Sam2Model`",
    "model.safetensors": "weights (float32, or bfloat16 where asked), and what medsam2 knows about them",
    "processor_config.json": "sizes and normalisation, for `Sam2VideoProcessor` and `Sam2Processor`",
    "preprocessor_config.json": "the same for pictures, for transformers before version 5",
    "video_preprocessor_config.json": "the same for videos, likewise",
    "verify.json": "what the check measured",
}
USAGE = """With transformers (`pip install "transformers>=4.56" torch torchvision`), from this folder. Slices and
frames are RGB pictures; repeat grey ones to three channels.

A volume or a video: prompt on one frame, and follow both ways. Give **all objects in one call**.

```python
import torch
from transformers import Sam2VideoModel, Sam2VideoProcessor

model = Sam2VideoModel.from_pretrained(".").eval()
processor = Sam2VideoProcessor.from_pretrained(".")
frames = torch.zeros(5, 3, 200, 240, dtype=torch.uint8)  # [T, 3, H, W]

session = processor.init_video_session(video=frames, inference_device="cpu")
boxes = [[[20, 20, 90, 80], [120, 60, 180, 150]]]  # x0, y0, x1, y1 in pixels, one a object
processor.add_inputs_to_inference_session(session, frame_idx=2, obj_ids=[1, 2], input_boxes=boxes)
model(session, frame_idx=2)
masks = {}
for reverse in (False, True):
    for seen in model.propagate_in_video_iterator(session, start_frame_idx=2, reverse=reverse):
        masks[seen.frame_idx] = processor.post_process_masks([seen.pred_masks], [[200, 240]])[0]  # [objects, 1, H, W]
```

A single picture:

```python
from transformers import Sam2Model, Sam2Processor

image_model, image_processor = Sam2Model.from_pretrained(".").eval(), Sam2Processor.from_pretrained(".")
inputs = image_processor(images=frames[2], input_points=[[[[55, 50]]]], input_labels=[[[1]]], return_tensors="pt")
with torch.no_grad():
    outputs = image_model(**inputs, multimask_output=True)  # three masks; outputs.iou_scores ranks them
candidates = image_processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"])[0]  # [1, 3, H, W]
```

After a prompt that is a **mask**, transformers gives slightly other masks than Meta's predictor and medsam2 (below).
"""


def export(
    checkpoint: str | Path | LoadedModel,
    out: Path | str,
    force: bool = False,
    verify: bool = True,
    case: str | ReferenceClip | None = None,
    scores: Path | None = None,
) -> ExportResult:
    """Write `FILES` and README.md into `out`, once transformers has loaded them and given our masks.

    Args:
        checkpoint: whatever `load_model` reads (adapters are merged), or a network that was loaded already.
        case: what both are run on, see `write_export`.
        scores: an evaluation folder of these weights, for the model card.

    Raises:
        UserError: `out` is not empty (without `force`), the checkpoint does not load, the scores are of other weights,
            or the check fails.
    """

    def describe(loaded: LoadedModel, found: Mapping[str, Any] | None) -> str:
        return card(TARGET, loaded, found, scores, files=FILES, usage=USAGE)

    return write_export(checkpoint, out, force, verify, case, scores, write_model, verify_huggingface, describe)


def write_model(loaded: LoadedModel, folder: Path) -> None:
    """Weights and configuration files, as transformers' own `save_pretrained` would name them.

    Raises:
        UserError: the installed transformers knows no SAM 2.
    """
    from safetensors.torch import save

    try:
        write_configs(folder, loaded.spec)
    except ImportError as error:
        raise UserError(
            f"the installed transformers has no SAM 2 ({error}): pip install 'transformers>=4.56'."
        ) from None
    # readers compute in float32 either way: config.json asks for it
    dtype = torch.bfloat16 if loaded.metadata.get("dtype") == "bf16" else torch.float32
    state = {key: value.detach().cpu().to(dtype) for key, value in loaded.sam.state_dict().items()}
    tensors = {key: value.contiguous() for key, value in to_huggingface(state).items()}
    header = {"format": "pt", "medsam2": json.dumps(primitives(loaded), sort_keys=True)}
    with atomic_write(folder / "model.safetensors") as file:
        file.write(save(tensors, metadata=header))
