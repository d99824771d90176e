"""Cut a case into segments: reduce its frames, tabulate its objects, choose which frames belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from medsam2.cases.case import Label, Line
from medsam2.cases.values import byte_counts


@dataclass(frozen=True, eq=False)
class ObjectFrames:
    """One object over all T frames of a case.

    Attributes:
        pixels: int64 [T]. boxes: int64 [T, 4] (x0, y0, x1, y1), x1 and y1 exclusive, zeros where absent.
        lines: RECIST measurements (frame, x0, y0, x1, y1) in stored pixels.
    """

    name: str
    value: int
    plane: int
    pixels: np.ndarray
    boxes: np.ndarray
    lines: tuple[tuple[int, float, float, float, float], ...] = ()


def reduce_frames(image: np.ndarray, planes: np.ndarray, max_side: int) -> tuple[np.ndarray, np.ndarray]:
    """Reduce image [T, H, W(, 3)] (by area) and planes [P, T, H, W] (nearest neighbour) to sides of `max_side`."""
    height, width = image.shape[1:3]
    if max(height, width) <= max_side:
        return image, planes
    import cv2

    factor = max_side / max(height, width)
    new_h, new_w = max(1, round(height * factor)), max(1, round(width * factor))
    small = np.stack([cv2.resize(frame, (new_w, new_h), interpolation=cv2.INTER_AREA) for frame in image])
    rows = ((np.arange(new_h) + 0.5) * height / new_h).astype(np.int64)
    columns = ((np.arange(new_w) + 0.5) * width / new_w).astype(np.int64)
    return small, planes[:, :, rows[:, None], columns[None, :]]


def object_frames(planes: np.ndarray, labels: tuple[Label, ...], min_pixels: int) -> list[ObjectFrames]:
    """List the labelled objects of planes [P, T, H, W] that have at least `min_pixels` pixels on some frame."""
    from scipy.ndimage import find_objects

    names = {(label.plane, label.id): label.name for label in labels}
    frames = planes.shape[1]
    objects: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    for plane in range(planes.shape[0]):
        for frame in range(frames):
            mask = planes[plane, frame]
            if not mask.any():
                continue
            # Values above 255 are rare and sparse: renumber them, since find_objects lists every value in between.
            values: np.ndarray = np.arange(int(mask.max()) + 1)
            if values.size > 256:
                values = np.unique(np.append(mask.ravel(), 0))
                mask = np.searchsorted(values, mask)
            small = mask.dtype == np.uint8
            count = byte_counts(mask) if small else np.bincount(mask.ravel(), minlength=values.size)
            for number, box in enumerate(find_objects(mask.astype(np.int32, copy=False)), start=1):
                key = (plane, int(values[number]))
                if box is None or key not in names:
                    continue
                if key not in objects:
                    objects[key] = (np.zeros(frames, np.int64), np.zeros((frames, 4), np.int64))
                pixels, boxes = objects[key]
                pixels[frame] = count[number]
                boxes[frame] = (box[1].start, box[0].start, box[1].stop, box[0].stop)
    return [
        ObjectFrames(names[key], key[1], key[0], pixels, boxes)
        for key, (pixels, boxes) in sorted(objects.items())
        if pixels.max() >= min_pixels
    ]


def with_lines(
    objects: list[ObjectFrames], lines: Sequence[Line], planes: np.ndarray, scale: tuple[float, float]
) -> list[ObjectFrames]:
    """Add each RECIST line to the object of its name that covers its midpoint, or else to the only object of that name.

    Args:
        planes: [P, T, H, W] as stored. scale: stored pixels per original pixel (y, x).
    """
    result = list(objects)
    for line in lines:
        x0, x1 = ((v + 0.5) * scale[1] - 0.5 for v in (line.x0, line.x1))
        y0, y1 = ((v + 0.5) * scale[0] - 0.5 for v in (line.y0, line.y1))
        named = [n for n, o in enumerate(result) if o.name == line.label]
        if not 0 <= line.frame < planes.shape[1]:
            continue
        row = min(max(round((y0 + y1) / 2), 0), planes.shape[2] - 1)
        column = min(max(round((x0 + x1) / 2), 0), planes.shape[3] - 1)
        at_midpoint = [n for n in named if planes[result[n].plane, line.frame, row, column] == result[n].value]
        for n in at_midpoint or (named if len(named) == 1 else []):
            stored = (line.frame, round(x0, 3), round(y0, 3), round(x1, 3), round(y1, 3))
            result[n] = replace(result[n], lines=(*result[n].lines, stored))
    return result


def histogram(frames: np.ndarray, bins: int = 32) -> tuple[int, ...]:
    """Count uint8 values [T, H, W(, 3)] in `bins` equal bins."""
    total = np.zeros(256, np.int64)
    for frame in frames:
        total += byte_counts(frame)
    return tuple(int(n) for n in total.reshape(bins, -1).sum(axis=1))


def training_spans(labelled: np.ndarray, length: int, margin: int) -> list[tuple[int, int]]:
    """Cut labelled frames and `margin` frames around them into equal parts of at most `length`: (first, stop).

    Args:
        labelled: bool [T], whether any object is on a frame.
    """
    total = labelled.size
    near = np.zeros(total, bool)
    for frame in np.flatnonzero(labelled):
        near[max(0, frame - margin) : frame + margin + 1] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[0], near.astype(np.int8), [0]])))
    spans = []
    for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        parts = -(-(stop - start) // length)
        cuts = [start + round(i * (stop - start) / parts) for i in range(parts + 1)]
        spans += [(a, b) for a, b in zip(cuts, cuts[1:], strict=False) if labelled[a:b].any()]
    return spans
