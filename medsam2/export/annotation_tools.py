"""What annotation programs ask for beside an encoder and a decoder: a yaml that they load as a custom model.

Keys as X-AnyLabeling 4.2 and AnyLabeling 0.4 read them; tests/consumers runs both on these files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medsam2.export.run import file_stem, write_text
from medsam2.model.build import LoadedModel, ModelSpec

FILES = {
    "x-anylabeling.yaml": "encoder and decoder as a custom model of X-AnyLabeling",
    "anylabeling.yaml": "the same for AnyLabeling",
}


def write_annotation_tools(loaded: LoadedModel, folder: Path) -> None:
    """`FILES`, beside the graphs that they name."""
    import yaml

    for name, said in contents(file_stem(loaded), loaded.spec).items():
        write_text(folder / name, yaml.safe_dump(said, sort_keys=False))


def contents(stem: str, spec: ModelSpec) -> dict[str, dict[str, Any]]:
    """What stands in each of `FILES`."""
    side = spec.image_size
    graphs = {
        "name": stem,
        "display_name": f"medsam2 {spec.name} ({side} px)",
        "encoder_model_path": f"{stem}_encoder.onnx",
        "decoder_model_path": f"{stem}_decoder.onnx",
    }
    # of "segment everything": the program's own thresholds (0.8, 0.95) drop what medical images show faintly
    grid = {"amg_pred_iou_thresh": 0.6, "amg_stability_score_thresh": 0.8}
    # they have to be there; the program reads the side from the encoder all the same
    sizes = {"input_size": side, "max_width": side, "max_height": side}
    return {
        "x-anylabeling.yaml": {"type": "segment_anything_2", **graphs, **grid},
        "anylabeling.yaml": {"type": "segment_anything", **graphs, **sizes},
    }
