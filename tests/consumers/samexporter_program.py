"""samexporter's command that runs a SAM 2 encoder and decoder on one picture.

    python samexporter_program.py ENCODER.onnx DECODER.onnx REQUEST.npz ANSWER.npz

Key of the request: `items`, a JSON list of {"picture": path, "marks": [...]}. Keys of the answer, by the item's number:
`N.drawn` [H, W, 3], the picture that the command wrote, and `N.logits` [H, W], the mask that it coloured there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
from samexporter import inference


def main(encoder: str, decoder: str, request: str, answer: str) -> None:
    """The command for each item, and once more by its own parts for the logits, which it does not write."""
    with np.load(request, allow_pickle=False) as file:
        items = json.loads(str(file["items"]))
    answers: dict[str, np.ndarray] = {}
    for number, item in enumerate(items):
        Path("marks.json").write_text(json.dumps(item["marks"]))
        command = [
            *("--encoder_model", encoder, "--decoder_model", decoder, "--sam_variant", "sam2"),
            *("--image", item["picture"], "--prompt", "marks.json", "--output", "drawn.png"),
        ]
        if inference.main(command):
            sys.exit(f"samexporter failed on {item}")
        answers[f"{number}.drawn"] = np.asarray(cv2.imread("drawn.png"))
        model = inference.load_model(inference.build_parser().parse_args(command))
        seen = model.encode(cv2.imread(item["picture"]))
        answers[f"{number}.logits"] = np.asarray(model.predict_masks(seen, item["marks"]))[0, 0]
    if "medsam2" in sys.modules or "torch" in sys.modules:
        sys.exit("medsam2 or PyTorch was imported: who runs these graphs needs neither")
    np.savez(answer, **answers)  # type: ignore[arg-type]  # its stub takes the names for options


if __name__ == "__main__":
    main(*sys.argv[1:])
