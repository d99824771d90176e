"""What annotation programs ask for beside an encoder and a decoder: a yaml that they load as a custom model.

Keys as X-AnyLabeling 4.2 and AnyLabeling 0.4 read them; tests/consumers runs both on these files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medsam2.export.run import file_stem, write_text
from medsam2.model.build import LoadedModel

FILES = {
    "x-anylabeling.yaml": "encoder and decoder as a custom model of X-AnyLabeling",
    "anylabeling.yaml": "the same for AnyLabeling",
}


def write_annotation_tools(loaded: LoadedModel, folder: Path) -> None:
    """`FILES`, beside the graphs that they name."""
    import yaml

    for name, own in zip(FILES, (_x_anylabeling(), _anylabeling(loaded.spec.image_size)), strict=True):
        stem = file_stem(loaded)
        said = {
            "type": own.pop("type"),
            "name": stem,
            "display_name": f"medsam2 {loaded.spec.name} ({loaded.spec.image_size} px)",
            "encoder_model_path": f"{stem}_encoder.onnx",
            "decoder_model_path": f"{stem}_decoder.onnx",
            **own,
        }
        write_text(folder / name, yaml.safe_dump(said, sort_keys=False))


def _x_anylabeling() -> dict[str, Any]:
    """The thresholds are those of "segment everything", whose own (0.8, 0.95) drop what medical images show faintly."""
    return {"type": "segment_anything_2", "amg_pred_iou_thresh": 0.6, "amg_stability_score_thresh": 0.8}


def _anylabeling(side: int) -> dict[str, Any]:
    """The three sizes have to be there; the program reads the side from the encoder all the same."""
    return {"type": "segment_anything", "input_size": side, "max_width": side, "max_height": side}
