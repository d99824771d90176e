"""Whole segments back from the shards, for evaluation and inspection."""

from __future__ import annotations

import json

import numpy as np

from medsam2.errors import UserError
from medsam2.shards.index import IndexRow, SegmentIndex
from medsam2.shards.record import CorruptFrameError, SegmentRecord, decode_frame, decode_mask


def load_segment(index: SegmentIndex, row: int) -> tuple[IndexRow, np.ndarray, np.ndarray]:
    """Segment `row`: its index row, image uint8 [T, H, W(, 3)] and label planes [P, T, H, W] on the stored grid.

    Raises:
        UserError: the shard is missing, cut short or damaged.
    """
    entry = index.row(row)
    first, last = entry.frame_offset[0], entry.mask_offset[-1] + entry.mask_length[-1]
    content = _read(index, entry, first, last - first)
    image = np.empty((len(entry.frames), *entry.frame_shape), np.uint8)
    planes = np.empty((entry.mask_planes, len(entry.frames), entry.height, entry.width), entry.mask_dtype)
    try:
        for t in range(len(entry.frames)):
            a, b = entry.frame_offset[t] - first, entry.mask_offset[t] - first
            image[t] = decode_frame(content[a : a + entry.frame_length[t]], entry.codec, entry.frame_shape)
            mask = content[b : b + entry.mask_length[t]]
            planes[:, t] = decode_mask(mask, entry.mask_codec, entry.mask_shape, entry.mask_dtype)
    except CorruptFrameError as error:
        raise UserError(
            f"{index.folder / entry.shard}: segment {entry.key} is damaged ({error}); prepare again."
        ) from None
    return entry, image, planes


def load_record(index: SegmentIndex, row: int) -> SegmentRecord:
    """The json member of segment `row`: what the index leaves out, such as the affine."""
    entry = index.row(row)
    return SegmentRecord.model_validate(json.loads(_read(index, entry, entry.json_offset, entry.json_length)))


def stored_spacing(row: IndexRow) -> tuple[float, float, float]:
    """(t or z, y, x) of the stored grid: the original spacing over the scale."""
    t, y, x = row.spacing
    return t, y / row.scale[0], x / row.scale[1]


def stored_affine(index: SegmentIndex, row: int) -> np.ndarray | None:
    """RAS+ affine [4, 4] of the segment's stored grid (x, y, frame within the segment), or None.

    Pixel centres are kept: a pixel of the stored grid covers 1/scale pixels of the original one.
    """
    record = load_record(index, row)
    if record.affine is None:
        return None
    scale_y, scale_x = record.scale
    place = np.diag([1 / scale_x, 1 / scale_y, 1.0, 1.0])
    place[:3, 3] = ((1 / scale_x - 1) / 2, (1 / scale_y - 1) / 2, record.frames[0])
    return np.asarray(np.array(record.affine) @ place)


def _read(index: SegmentIndex, entry: IndexRow, offset: int, length: int) -> bytes:
    path = index.folder / entry.shard
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(length)
    except FileNotFoundError:
        raise UserError(f"{path}: the index names this shard but it is not there; prepare again.") from None
    if len(content) != length:
        raise UserError(f"{path}: ends after {path.stat().st_size} bytes, expected at least {offset + length}.")
    return content
