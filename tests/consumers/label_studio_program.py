"""Label Studio's example `segment_anything_2_image`: its sequence of calls, with Meta's code and Label Studio's SDK.

    python label_studio_program.py ROOT REQUEST.npz ANSWER.npz

The example itself is on GitHub alone. As there, ROOT is a checkout of sam2 with a folder checkpoints; MODEL_CONFIG,
MODEL_CHECKPOINT and DEVICE name what is loaded from it; and pictures come from the local storage of
LOCAL_FILES_DOCUMENT_ROOT by their address in a task.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, sys.argv[1])
import sam2
from label_studio_sdk._extensions.label_studio_tools.core.utils.io import get_local_path
from label_studio_sdk.converter import brush
from sam2.build_sam import build_sam2
from sam2.sam2_image_predictor import SAM2ImagePredictor


def prompts_of(regions: list[dict[str, Any]], width: int, height: int) -> dict[str, np.ndarray]:
    """The predictor's arguments: regions are in percent of the picture, prompts in whole pixels."""
    clicks, box = [], None
    for region in regions:
        value = region["value"]
        corner = int(value["x"] * width / 100), int(value["y"] * height / 100)
        if region["type"] == "keypointlabels":
            clicks.append((*corner, int(region["is_positive"])))
        else:
            far = (value["x"] + value["width"]) * width / 100, (value["y"] + value["height"]) * height / 100
            box = np.array([*corner, int(far[0]), int(far[1])], np.float32)
    said = {} if box is None else {"box": box}
    if clicks:
        points = np.array(clicks, np.float32)
        said |= {"point_coords": points[:, :2], "point_labels": points[:, 2]}
    return said


def main(root: str, request: str, answer: str) -> None:
    assert Path(sam2.__file__).parent.parent == Path(root), "not the checkout's package"
    with np.load(request, allow_pickle=False) as file:
        items = json.loads(str(file["items"]))
    weights = Path(root) / "checkpoints" / os.environ["MODEL_CHECKPOINT"]
    predictor = SAM2ImagePredictor(build_sam2(os.environ["MODEL_CONFIG"], str(weights), device=os.environ["DEVICE"]))
    found: dict[str, np.ndarray] = {}
    for name, item in items.items():
        picture = np.array(Image.open(get_local_path(item["image"], task_id=1)).convert("RGB"))
        height, width = picture.shape[:2]
        predictor.set_image(picture)
        prompts = prompts_of(item["regions"], width, height)
        masks, scores, _ = predictor.predict(**prompts, multimask_output=True)
        code = brush.mask2rle(masks[scores.argmax()].astype(np.uint8) * 255)
        found[name] = brush.decode_rle(code).reshape(height, width, 4)[..., 3] > 0
        found |= {f"{name}.{key}": value for key, value in prompts.items()}
    np.savez(answer, **found)  # type: ignore[arg-type]  # its stub takes the names for options


if __name__ == "__main__":
    main(*sys.argv[1:])
