"""The members of a shard sample (a segment), and the encoding of its frames.

A segment is up to 64 neighbouring frames of one case. Its members in the tar are `KEY.json` (a `SegmentRecord`; the key
has no dots), then per frame `KEY.0000.zst` and `KEY.0000.mask.zst` (or `.lz4`, `.png`, `.jpg` for the image; masks are
zstd or lz4). Zstd and lz4 carry a checksum, so that decoding detects a flipped bit. Shards of other tools may hold
masks as PNG.
"""

from __future__ import annotations

import io
from typing import Literal

import imagecodecs
import lz4.frame
import numpy as np
import zstandard
from PIL import Image
from pydantic import BaseModel, ConfigDict

Codec = Literal["zstd", "lz4", "png", "jpeg"]
EXTENSIONS = {"zstd": "zst", "lz4": "lz4", "png": "png", "jpeg": "jpg"}
ZSTD_LEVEL = 3
JPEG_QUALITY = 95


class CorruptFrameError(ValueError):
    """A member does not decode to the shape that its record states."""


class ObjectTable(BaseModel):
    """One object of a segment: frames are chosen from this table before anything is decoded.

    `value` is the object's value in label plane `plane`. `pixels` has one count per frame; `boxes` one (x0, y0, x1, y1)
    per frame in pixels of the stored grid, x1 and y1 exclusive, zeros where the object is absent. `lines` are RECIST
    measurements, (frame within the segment, x0, y0, x1, y1) in the same pixels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    value: int
    plane: int
    pixels: tuple[int, ...]
    boxes: tuple[tuple[int, int, int, int], ...]
    lines: tuple[tuple[int, float, float, float, float], ...] = ()


class SegmentRecord(BaseModel):
    """The json member of a segment.

    Attributes:
        key: unique in the dataset, without dots.
        case, patient: salted hashes, never names.
        content_hash: sha256 of the case's native image, for leak checks in evaluation.
        frames: original frame indices in order; neighbours are neighbours in the source.
        shape: (T, H, W) of the stored frames. channels: 1 or 3. mask_planes: P; mask_dtype: uint8 or uint16.
        original_shape: (T, H, W) of the whole case before any reduction.
        spacing: (t or z, y, x) of the ORIGINAL grid, mm or seconds.
        scale: stored pixels per original pixel (y, x); 1.0 unless the frame exceeded `max_side`.
        window: the intensity window or rule of the uint8 frames, e.g. "-160:240 HU".
        axes, flips: the `Orientation` that turned the source's array [Z, Y, X] into [T, H, W], to invert it later.
        histogram: counts of the stored intensities in 32 equal bins, all channels together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    dataset: str
    split: str
    case: str
    patient: str
    content_hash: str
    modality: str
    kind: str
    frames: tuple[int, ...]
    shape: tuple[int, int, int]
    channels: int
    mask_planes: int
    mask_dtype: str
    original_shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...] | None
    scale: tuple[float, float]
    window: str
    codec: Codec
    mask_codec: Literal["zstd", "lz4"]
    objects: tuple[ObjectTable, ...]
    axes: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[bool, bool, bool] = (False, False, False)
    histogram: tuple[int, ...] = ()


def encode_frame(array: np.ndarray, codec: str) -> bytes:
    """Encode a uint8 frame [H, W] or [H, W, 3] as the payload of a member."""
    if codec == "png":
        return bytes(imagecodecs.png_encode(np.ascontiguousarray(array)))
    if codec == "jpeg":
        return bytes(imagecodecs.jpeg8_encode(np.ascontiguousarray(array), level=JPEG_QUALITY))
    return _pack(np.ascontiguousarray(array), codec)


def decode_frame(
    payload: bytes | memoryview, codec: str, shape: tuple[int, ...], out: np.ndarray | None = None
) -> np.ndarray:
    """Decode the uint8 frame of `shape` ([H, W] or [H, W, 3]) from a member's payload.

    Args:
        out: a C-contiguous uint8 array of `shape` to decode into, which is then returned.

    Raises:
        CorruptFrameError: it does not decode to that shape.
    """
    out = np.empty(shape, np.uint8) if out is None else out
    if codec in ("png", "jpeg"):
        _decode_picture(payload, codec, out)
    else:
        _unpack(payload, codec, out)
    return out


def encode_mask(array: np.ndarray, codec: str) -> bytes:
    """Encode label planes [P, H, W] (uint8 or uint16) of one frame as the payload of a member, little-endian."""
    return _pack(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")), codec)


def decode_mask(
    payload: bytes | memoryview, codec: str, shape: tuple[int, ...], dtype: str, out: np.ndarray | None = None
) -> np.ndarray:
    """Decode label planes of `shape` [P, H, W] and `dtype` from a member's payload; a PNG has one plane.

    Args:
        out: a C-contiguous little-endian array of `shape` and `dtype` to decode into, which is then returned.

    Raises:
        CorruptFrameError: it does not decode to that shape.
    """
    out = np.empty(shape, np.dtype(dtype).newbyteorder("<")) if out is None else out
    if codec == "png":
        out[0] = _mask_picture(payload, out.shape[1:])
    else:
        _unpack(payload, codec, out)
    return out


def _decode_picture(payload: bytes | memoryview, codec: str, out: np.ndarray) -> None:
    """Decode PNG or JPEG into `out`; an image of another number of channels is refused, not converted."""
    decode = imagecodecs.png_decode if codec == "png" else imagecodecs.jpeg8_decode
    if codec == "jpeg" and b"\xff\xd9" not in bytes(payload[-64:]):
        raise CorruptFrameError("jpeg frame is truncated")  # the decoder would fill the rest with grey
    try:
        frame = np.asarray(decode(bytes(payload)))
    except (RuntimeError, ValueError) as error:
        raise CorruptFrameError(f"{codec} frame does not decode: {error}") from None
    if frame.shape != out.shape or frame.dtype != np.uint8:
        raise CorruptFrameError(f"{codec} frame is {frame.shape} {frame.dtype}, expected {out.shape} uint8")
    np.copyto(out, frame)


def _mask_picture(payload: bytes | memoryview, size: tuple[int, ...]) -> np.ndarray:
    """Decode the indices of a palette PNG or the values of a grey one; imagecodecs would convert indices to colours."""
    try:
        with Image.open(io.BytesIO(payload), formats=("PNG",)) as picture:
            if (picture.height, picture.width) != tuple(size):
                raise CorruptFrameError(f"png mask is {picture.height} x {picture.width}, expected {size}")
            values = np.asarray(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise CorruptFrameError(f"png mask does not decode: {error}") from None
    if values.ndim != 2:
        raise CorruptFrameError(f"png mask has {values.ndim} dimensions; expected a palette or grey image")
    return values


def _pack(array: np.ndarray, codec: str) -> bytes:
    if codec == "zstd":
        return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(array.data)
    if codec == "lz4":
        return bytes(lz4.frame.compress(array.data, content_checksum=True))
    raise ValueError(f"unknown codec {codec!r}")


def _unpack(payload: bytes | memoryview, codec: str, out: np.ndarray) -> None:
    """Decompress into `out`, at most its size, so that a decompression bomb cannot fill the memory."""
    flat = out.reshape(-1).view(np.uint8)
    if codec in ("zstd", "lz4"):
        decode = imagecodecs.zstd_decode if codec == "zstd" else imagecodecs.lz4f_decode
        try:
            # The lz4 decoder stops at the end of `out` without an error, hence this check.
            if _decompressed_size(payload, codec) > len(flat):
                raise CorruptFrameError(f"frame decompresses to more than the expected {len(flat)} bytes")
            count = len(decode(payload, out=flat.data))  # type: ignore[arg-type]  # any buffer will do
        except (RuntimeError, zstandard.ZstdError) as error:
            raise CorruptFrameError(f"{codec} frame does not decode: {error}") from None
    else:
        raise ValueError(f"unknown codec {codec!r}")
    if count != len(flat):
        raise CorruptFrameError(f"{codec} frame has {count} bytes, expected {len(flat)} for {out.shape} {out.dtype}")


def _decompressed_size(payload: bytes | memoryview, codec: str) -> int:
    """The decompressed size in bytes that a frame's header states; 0 or less if it states none."""
    if codec == "zstd":
        return zstandard.frame_content_size(payload)
    return int(lz4.frame.get_frame_info(payload)["content_size"])
