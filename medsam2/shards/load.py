"""Whole segments back from the shards, for evaluation and inspection."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np

from medsam2.errors import UserError
from medsam2.shards.index import IndexRow, SegmentIndex
from medsam2.shards.record import CorruptFrameError, ObjectTable, SegmentRecord, decode_frame, decode_mask

SPARSE, SLACK = 4, 1 << 20
"""What lies between the members of a segment is read along, up to so many times their bytes and so many bytes more."""


def load_segment(index: SegmentIndex, row: int) -> tuple[IndexRow, np.ndarray, np.ndarray]:
    """Segment `row`: its index row, image uint8 [T, H, W(, 3)] and label planes [P, T, H, W] on the stored grid.

    Raises:
        UserError: the shard is missing, cut short or damaged.
    """
    entry = index.row(row)
    frames, masks = _payloads(index, entry)
    image = np.empty((len(entry.frames), *entry.frame_shape), np.uint8)
    planes = np.empty((entry.mask_planes, len(entry.frames), entry.height, entry.width), entry.mask_dtype)
    try:
        for t in range(len(entry.frames)):
            image[t] = decode_frame(frames[t], entry.codec, entry.frame_shape)
            planes[:, t] = decode_mask(masks[t], entry.mask_codec, entry.mask_shape, entry.mask_dtype)
    except CorruptFrameError as error:
        raise UserError(
            f"{index.folder / entry.shard}: segment {entry.key} is damaged ({error}); prepare again."
        ) from None
    return entry, image, planes


def load_record(index: SegmentIndex, row: int) -> SegmentRecord:
    """The json member of segment `row`: what the index leaves out, such as the affine.

    A sample of another tool has no such member (`json_length` is 0): its record says what the index says.
    """
    entry = index.row(row)
    if not entry.json_length:
        return _record_of(entry)
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


def _record_of(entry: IndexRow) -> SegmentRecord:
    known = {f.name: getattr(entry, f.name) for f in fields(entry) if f.name in SegmentRecord.model_fields}
    tables = tuple(
        ObjectTable(
            name=found.name,
            value=found.value,
            plane=found.plane,
            pixels=tuple(found.pixels),
            boxes=tuple(map(tuple, np.reshape(found.boxes, (-1, 4)).tolist())),
        )
        for found in entry.objects
    )
    shape = (len(entry.frames), entry.height, entry.width)
    # not validated: the index may name codecs (raw, png masks) that we never write ourselves
    return SegmentRecord.model_construct(**{**known, "objects": tables, "shape": shape, "affine": None})


def _payloads(index: SegmentIndex, entry: IndexRow) -> tuple[list[bytes], list[bytes]]:
    """The bytes of every frame and of every mask, in one read where they stand together, as in our own shards."""
    frames = list(zip(entry.frame_offset, entry.frame_length, strict=True))
    masks = list(zip(entry.mask_offset, entry.mask_length, strict=True))
    first, last = min(frames + masks)[0], max(offset + length for offset, length in frames + masks)
    if last - first > SPARSE * sum(length for _, length in frames + masks) + SLACK:
        # of another tool's tar, with large members in between that are of no use here
        return [_read(index, entry, *place) for place in frames], [_read(index, entry, *place) for place in masks]
    content = _read(index, entry, first, last - first)
    return [_cut(content, first, *place) for place in frames], [_cut(content, first, *place) for place in masks]


def _cut(content: bytes, first: int, offset: int, length: int) -> bytes:
    return content[offset - first : offset - first + length]


def _read(index: SegmentIndex, entry: IndexRow, offset: int, length: int) -> bytes:
    where = index.folder / entry.shard
    try:
        content = index.read(entry.shard, offset, length)
    except FileNotFoundError:
        raise UserError(f"{where}: the index names this shard but it is not there; prepare again.") from None
    except OSError as error:
        raise UserError(f"{entry.shard}: cannot be read ({error}).") from None
    if len(content) != length:
        raise UserError(f"{where}: ends after at most {offset + len(content)} bytes, not {offset + length}.")
    return content
