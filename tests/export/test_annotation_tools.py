from __future__ import annotations

from pathlib import Path

import yaml

from medsam2.export.annotation_tools import FILES, write_annotation_tools
from medsam2.model.build import load_model


def test_each_program_gets_a_model_file_that_names_the_graphs_relative_to_itself(tmp_path: Path) -> None:
    write_annotation_tools(load_model("nano"), tmp_path)
    said = {name: yaml.safe_load((tmp_path / name).read_text()) for name in FILES}
    assert {path.name for path in tmp_path.iterdir()} == {*FILES}
    assert all(entry["encoder_model_path"] == "medsam2_nano_128_encoder.onnx" for entry in said.values())
    assert all(entry["decoder_model_path"] == "medsam2_nano_128_decoder.onnx" for entry in said.values())
    assert said["x-anylabeling.yaml"]["type"] == "segment_anything_2"
    assert [said["anylabeling.yaml"][key] for key in ("input_size", "max_width", "max_height")] == [128, 128, 128]
