"""AnyLabeling, or X-AnyLabeling which grew out of it: loads a custom model, and annotates pictures, without a window.

    python anylabeling_program.py MODEL.yaml REQUEST.npz ANSWER.npz

Both call their package `anylabeling`; which one it is, the path decides. What their windows do with a user's click is
done here by hand: the manager is given a yaml, the marks, and the picture as Qt read it.

Key of the request: `items`, a JSON list of {"picture": path, "marks": [...]}. Keys of the answer, by the item's number:
`N.shapes`, a JSON list of {"type", "points"}, and `N.logits` [H, W], the mask that they go around.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import anylabeling.config
import numpy as np
from anylabeling.services.auto_labeling.model_manager import ModelManager
from PyQt6.QtCore import QCoreApplication
from PyQt6.QtGui import QImage

SECONDS = 120


def opened(config: str) -> ModelManager:
    """A manager that has loaded a custom model in its own thread, as the window's "load custom model" does."""
    name = ".xanylabelingrc" if hasattr(anylabeling.config, "get_work_directory") else ".anylabelingrc"
    anylabeling.config.current_config_file = str(Path.home() / name)
    anylabeling.config.get_default_config()  # writes that file at the first start
    manager = ModelManager()
    said: list[str] = []
    manager.new_model_status.connect(said.append)
    loaded: list[dict[str, Any]] = []
    manager.model_loaded.connect(loaded.append)
    manager.load_custom_model(config)
    end = time.monotonic() + SECONDS
    while not loaded and time.monotonic() < end:
        QCoreApplication.processEvents()
        time.sleep(0.01)
    if not manager.loaded_model_config:
        sys.exit(f"{config} was not loaded: {said}")
    return manager


def annotated(manager: ModelManager, item: dict[str, Any]) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Shapes of one picture, and the logits that they go around (none for a grid of clicks, which has many)."""
    found: list[Any] = []
    manager.new_auto_labeling_result.connect(found.append)
    manager.set_auto_labeling_marks(item["marks"])
    manager.predict_shapes(QImage(item["picture"]), item["picture"])
    manager.new_auto_labeling_result.disconnect(found.append)
    shapes = [
        {"type": shape.shape_type, "points": [[point.x(), point.y()] for point in shape.points]}
        for result in found
        for shape in result.shapes
    ]
    assert manager.loaded_model_config
    model = manager.loaded_model_config["model"]
    if item["marks"][0]["type"] == "auto_grid":
        return shapes, np.zeros((0, 0), np.float32)
    seen = model.image_embedding_cache.get(item["picture"])
    return shapes, np.asarray(model.model.predict_masks(seen, item["marks"]))[0, 0]


def main(config: str, request: str, answer: str) -> None:
    """Annotate all pictures of the request."""
    with np.load(request, allow_pickle=False) as file:
        items = json.loads(str(file["items"]))
    application = QCoreApplication([])
    manager = opened(config)
    answers: dict[str, np.ndarray] = {}
    for number, item in enumerate(items):
        shapes, logits = annotated(manager, item)
        answers |= {f"{number}.shapes": np.array(json.dumps(shapes)), f"{number}.logits": logits}
    manager.unload_model()
    application.processEvents()
    if "medsam2" in sys.modules or "torch" in sys.modules:
        sys.exit("medsam2 or PyTorch was imported: a user of this program has neither")
    np.savez(answer, **answers)  # type: ignore[arg-type]  # its stub takes the names for options


if __name__ == "__main__":
    main(*sys.argv[1:])
