"""A user of exported graphs: runs them with the folder's own `propagate.py`."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np


class Consumer:
    """Graphs of a folder (`answer.py` calls it).

    Legend: N objects, T frames, S the model's side.
    """

    def __init__(self, folder: str) -> None:
        place = Path(folder)
        self.script = runpy.run_path(str(place / "propagate.py"))
        self.run = self.script["graphs"](place)
        self.settings = json.loads((place / f"{self.script['stem'](place)}.json").read_text())
        self.banned = {"sam2", "torch"} if any(place.glob("*.onnx")) else {"sam2"}

    def follow(self, frames: np.ndarray, prompts: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Logits [N, T, S, S] and object scores [N, T]."""
        result = self.script["propagate"](self.run, self.settings, np.moveaxis(frames, 1, -1), prompts)
        return result["logits"], result["scores"]

    def segment(self, frame: np.ndarray, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Logits [N, 3, S/4, S/4] and predicted IoUs [N, 3] of one picture [3, S, S]."""
        follower = self.script["Follower"](self.run, self.settings, np.moveaxis(frame[None], 1, -1))
        fine, middle, embed = follower.features(0)
        answer: list[np.ndarray] = self.run(
            "decoder", image_embed=embed, high_res_feats_0=fine, high_res_feats_1=middle, **inputs
        )
        return answer
