"""Pictures, marks and our masks for tests of programs that take an exported encoder and decoder.

Legend: H and W pixels of a picture.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medsam2.export.run import export_model
from medsam2.export.verify.clip import generated_clip
from medsam2.model.build import load_model
from medsam2.model.memory_bank import MemoryBank
from medsam2.model.tracker import Tracker
from medsam2.pixels import normalise
from medsam2.prompts.kinds import Prompts

Mark = Mapping[str, Any]
QT = ("libEGL.so.1", "libGL.so.1", "libglib-2.0.so.0", "libfontconfig.so.1", "libxkbcommon.so.0", "libdbus-1.so.3")
_PLACE = tempfile.TemporaryDirectory(prefix="annotation_tools_")
TOP = 10  # rows that pictures lack of the generated frame, so that their sides differ


def qt_or_skip() -> None:
    """PyQt's wheels leave some libraries to the system, even where no window is opened."""
    for name in QT:
        try:
            ctypes.CDLL(name)
        except OSError:
            pytest.skip(f"Qt needs {name}: apt-get install libegl1 libgl1 libglib2.0-0 libfontconfig1 libxkbcommon0 "
                        "libdbus-1-3")  # fmt: skip


@cache
def exported() -> Path:
    """The files of `medsam2 export -c nano --to onnx`: once in a process, because it takes half a minute."""
    folder = Path(_PLACE.name) / "exported"
    export_model("nano", "onnx", folder, verify=False)
    return folder


def pictures(folder: Path) -> dict[str, Path]:
    """8-bit PNG files: grey, colour (its channels are far apart), and colour at the model's side."""
    grey = generated_clip(length=3).frames[1, 0, TOP:-TOP].numpy()
    colour = np.stack([grey, grey // 2, grey // 3], -1)
    drawn = {"grey": grey, "colour": colour[..., ::-1], "side": cv2.resize(colour, (128, 128))[..., ::-1]}
    paths = {name: folder / f"{name}.png" for name in drawn}
    for name, values in drawn.items():
        assert cv2.imwrite(str(paths[name]), np.ascontiguousarray(values))
    return paths


def marks(width: int = 160, height: int = 140) -> dict[str, list[Mark]]:
    """What annotation windows hand to their models, on the second object of the generated frame."""
    x0, y0, x1, y1 = 95 * width / 160, (68 - TOP) * height / 140, 132 * width / 160, (106 - TOP) * height / 140
    box = [int(value) for value in (x0, y0, x1, y1)]
    inside = {"type": "point", "data": [(box[0] + box[2]) // 2, (box[1] + box[3]) // 2], "label": 1}
    outside = {"type": "point", "data": [box[0] - 5, box[1] - 5], "label": 0}
    boxed = {"type": "rectangle", "data": box, "label": 1}
    return {"box": [boxed], "click": [inside], "clicks": [inside, outside], "box and click": [boxed, outside]}


class Ours:
    """Our tracker on one picture."""

    def __init__(self) -> None:
        self._tracker = Tracker(load_model("nano").sam).eval()

    @torch.no_grad()
    def __call__(
        self, picture: np.ndarray, given: Sequence[Mark], smooth: bool = True, whole: bool = True
    ) -> np.ndarray:
        """Logits [H, W] of a uint8 picture [H, W, 3], RGB.

        Args:
            smooth: resize as we do; False: as OpenCV does by default, which skips pixels.
            whole: cut prompts to whole pixels of the model's square: both windows scale them in an array of integers.
        """
        side = self._tracker.image_size
        height, width = picture.shape[:2]
        small = picture if smooth else cv2.resize(picture, (side, side))
        points = np.concatenate([np.reshape(mark["data"], (-1, 2)) for mark in given]) * [side / width, side / height]
        labels = [label for mark in given for label in ([2, 3] if mark["type"] == "rectangle" else [mark["label"]])]
        prompts = Prompts(torch.from_numpy(np.trunc(points) if whole else points).float()[None], torch.tensor([labels]))
        frames = torch.from_numpy(np.ascontiguousarray(small.transpose(2, 0, 1)))[None]
        found = self._tracker.segment(self._tracker.encode(normalise(frames, side)), MemoryBank(), 0, prompts)
        logits: np.ndarray = F.interpolate(found.logits, (height, width), mode="bilinear")[0, 0].numpy()
        assert (logits > 0).sum() > 50, "the comparison proves nothing"
        return logits


def read(path: Path) -> np.ndarray:
    """A picture as uint8 [H, W, 3], RGB."""
    return np.ascontiguousarray(np.asarray(cv2.imread(str(path), cv2.IMREAD_COLOR))[..., ::-1])


def filled(shapes: Sequence[Mapping[str, Any]], height: int, width: int) -> np.ndarray:
    """The mask [H, W] that a program's polygons go around."""
    canvas = np.zeros((height, width), np.uint8)
    cv2.fillPoly(canvas, [np.array(shape["points"], np.int32) for shape in shapes], (1,))
    return canvas > 0
