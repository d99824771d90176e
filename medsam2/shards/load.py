"""Read segments, frames and records from shards.

Legend: T frames, H and W pixels, P label planes.
"""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np

from medsam2.errors import UserError
from medsam2.shards.index import IndexRow, SegmentIndex
from medsam2.shards.record import CorruptFrameError, SegmentRecord, decode_frame, decode_mask

MAX_READ_RATIO, EXTRA_READ_BYTES = 4, 1 << 20
"""One read spans all members of a segment if it reads at most this multiple of their bytes, plus these bytes."""


def load_segment(index: SegmentIndex, row: int) -> tuple[IndexRow, np.ndarray, np.ndarray]:
    """Read segment `row`: its index row, image uint8 [T, H, W(, 3)] and label planes [P, T, H, W] on the stored grid.

    Raises:
        UserError: the shard is missing, truncated or damaged.
    """
    entry = index.row(row)
    frames = list(zip(entry.frame_offset, entry.frame_length, strict=True))
    masks = list(zip(entry.mask_offset, entry.mask_length, strict=True))
    first = min(frames + masks)[0]
    last, size = max(map(sum, frames + masks)), sum(length for _, length in frames + masks)
    # Members of shards of `medsam2 prepare` are adjacent; those of other tools may be far apart.
    one_read = last - first <= MAX_READ_RATIO * size + EXTRA_READ_BYTES
    content = _read(index, entry, first, last - first) if one_read else b""

    def member(offset: int, length: int) -> bytes:
        return content[offset - first : offset - first + length] if one_read else _read(index, entry, offset, length)

    image = np.empty((len(frames), *entry.frame_shape), np.uint8)
    planes = np.empty((entry.mask_planes, len(frames), entry.height, entry.width), entry.mask_dtype)
    for t, members in enumerate(zip(frames, masks, strict=True)):
        image[t], planes[:, t] = _decode(index, entry, *(member(*span) for span in members))
    return entry, image, planes


def load_frame(index: SegmentIndex, entry: IndexRow, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """Read one frame of a segment, uint8 [H, W(, 3)], and its label planes [P, H, W], and nothing else.

    Raises:
        UserError: as `load_segment`.
    """
    content = _read(index, entry, entry.frame_offset[frame], entry.frame_length[frame])
    return _decode(index, entry, content, _read(index, entry, entry.mask_offset[frame], entry.mask_length[frame]))


def load_record(index: SegmentIndex, row: int) -> SegmentRecord:
    """Read the json member of segment `row`, which has fields that the index lacks, such as the affine.

    A sample of another tool has no such member (`json_length` is 0). Its record is built from the index row, without
    objects.
    """
    entry = index.row(row)
    if not entry.json_length:
        values = {f.name: getattr(entry, f.name) for f in fields(entry) if f.name in SegmentRecord.model_fields}
        values |= {"objects": (), "shape": (len(entry.frames), entry.height, entry.width), "affine": None}
        # Not validated: masks of other tools are png, which the model does not allow.
        return SegmentRecord.model_construct(**values)
    return SegmentRecord.model_validate(json.loads(_read(index, entry, entry.json_offset, entry.json_length)))


def stored_spacing(row: IndexRow) -> tuple[float, float, float]:
    """(t or z, y, x) of the stored grid: the original spacing over the scale."""
    t, y, x = row.spacing
    return t, y / row.scale[0], x / row.scale[1]


def _decode(index: SegmentIndex, entry: IndexRow, frame: bytes, mask: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Decode the frame [H, W(, 3)] and the label planes [P, H, W] of two members."""
    mask_shape = (entry.mask_planes, entry.height, entry.width)
    try:
        image = decode_frame(frame, entry.codec, entry.frame_shape)
        return image, decode_mask(mask, entry.mask_codec, mask_shape, entry.mask_dtype)
    except CorruptFrameError as error:
        raise UserError(
            f"{index.folder / entry.shard}: segment {entry.key} is damaged ({error}); prepare again."
        ) from None


def _read(index: SegmentIndex, entry: IndexRow, offset: int, length: int) -> bytes:
    where = index.folder / entry.shard
    try:
        content = index.read(entry.shard, offset, length)
    except FileNotFoundError:
        raise UserError(f"{where}: the index names this shard, but the file is missing; prepare again.") from None
    except OSError as error:
        raise UserError(f"{entry.shard}: cannot be read ({error}).") from None
    if len(content) != length:
        raise UserError(f"{where}: ends after at most {offset + len(content)} bytes, not {offset + length}.")
    return content
