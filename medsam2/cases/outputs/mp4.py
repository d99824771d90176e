"""Write an MP4 for viewing: each frame with its objects tinted and outlined. Label values cannot be read from it."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from medsam2.cases.outputs.masks import Masks, Output

SLICES_PER_SECOND = 10
TINT_OPACITY = 0.35
OBJECT_COLOURS = np.array(
    [(52, 211, 153), (251, 191, 36), (56, 189, 248), (244, 114, 182), (192, 132, 252), (251, 113, 133)], np.float32
)


def write(path: Path, masks: Masks) -> None:
    """Write all frames in the network's orientation: clips at their frame rate, volumes at ten slices per second."""
    seconds = masks.spacing[0] if masks.moving else 1 / SLICES_PER_SECOND
    colour = {value: OBJECT_COLOURS[number % len(OBJECT_COLOURS)] for number, value in enumerate(masks.values)}
    below, right = (side % 2 for side in masks.shape[1:])  # yuv420p needs even sides
    overlays = (overlay(masks.picture(frame), masks.labels(frame), colour) for frame in range(masks.shape[0]))
    padded = (np.pad(frame, ((0, below), (0, right), (0, 0)), mode="edge") for frame in overlays)
    encode(path, padded, min(max(1 / seconds, 1.0), 240.0), crf=18)


def encode(path: Path, frames: Iterable[np.ndarray], rate: float, crf: int, threads: int | None = None) -> None:
    """Encode uint8 frames [H, W, 3] with even sides as H.264.

    Args:
        rate: frames per second. crf: constant rate factor of H.264; 0 is lossless.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000))
        assert isinstance(stream, av.VideoStream)
        stream.pix_fmt = "yuv420p"
        if threads:
            stream.codec_context.thread_count = threads
        # Looking ahead, x264 reads bytes that nobody has set: the same frames would give other files.
        stream.options = {"crf": str(crf), "preset": "veryfast", "tune": "zerolatency"}
        for frame in frames:
            if not stream.codec_context.is_open:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def overlay(picture: np.ndarray, labels: np.ndarray, colours: dict[int, np.ndarray]) -> np.ndarray:
    """Return uint8 [H, W, 3]: `picture` ([H, W] or [H, W, 3]) with each label tinted and its outline in full colour."""
    blended = np.repeat(picture[..., None], 3, axis=-1) if picture.ndim == 2 else picture.copy()
    labelled = labels > 0
    if not labelled.any():
        return blended
    table = np.zeros((int(labels.max()) + 1, 3), np.float32)
    for value, colour in colours.items():
        if value < len(table):
            table[value] = colour
    edge = cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))) > 0
    tint = table[labels[labelled]]
    opacity = np.where(edge[labelled], 1.0, TINT_OPACITY)[:, None]
    blended[labelled] = np.rint((1 - opacity) * blended[labelled] + opacity * tint).astype(np.uint8)
    return blended


OUTPUTS = (Output("mp4", "an overlay video (.mp4)", (".mp4",), (), write),)
