"""What one shard sample (a `Segment`) holds, and how its frames are encoded.

A segment is up to 64 neighbouring frames of one case. Its members in the tar, keys without dots:
`KEY.json` (a `SegmentRecord`), then per frame `KEY.0000.zst` and `KEY.0000.mask.zst`
(or `.lz4`, `.png`, `.jpg` for the image; masks are always zstd or lz4). Both carry a checksum, so that a flipped bit is
found when a frame is decoded. Shards of other tools may also hold masks as PNG.
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
ENDINGS = {"zstd": "zst", "lz4": "lz4", "png": "png", "jpeg": "jpg"}
ZSTD_LEVEL = 3
JPEG_QUALITY = 95


class CorruptFrameError(ValueError):
    """A member does not decode to the shape that its record promises."""


class ObjectTable(BaseModel):
    """One object of a segment, with what is needed to choose frames before anything is decoded.

    `value` is the object's value in label plane `plane`. `pixels` has one count a frame; `boxes` one
    (x0, y0, x1, y1) a frame in pixels of the stored grid, x1 and y1 exclusive, zeros where it is absent.
    `lines` are RECIST measurements, (frame within the segment, x0, y0, x1, y1) in the same pixels.
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
        key: unique in the data set, without dots.
        case, patient: salted hashes, never names.
        content_hash: sha256 of the case's native image, for leak checks in evaluation.
        frames: original frame indices in order; neighbours are neighbours in the source.
        shape: (T, H, W) of the stored frames. channels: 1 or 3. mask_planes: P; mask_dtype: uint8 or uint16.
        original_shape: (T, H, W) of the whole case before any reduction.
        spacing: (t or z, y, x) of the ORIGINAL grid, mm or seconds.
        scale: stored pixels per original pixel (y, x); 1.0 unless the frame exceeded `max_side`.
        window: the intensity window or rule that made the uint8 frames, e.g. "-160:240 HU".
        axes, flips: how the source's array [Z, Y, X] was turned into [T, H, W] (`Orientation`), for the way back.
        histogram: 32 counts of the stored intensities (8 grey values each, all channels together).
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
    """One uint8 frame [H, W] or [H, W, 3] as the payload of a member."""
    if codec == "png":
        return bytes(imagecodecs.png_encode(np.ascontiguousarray(array)))
    if codec == "jpeg":
        return bytes(imagecodecs.jpeg8_encode(np.ascontiguousarray(array), level=JPEG_QUALITY))
    return _pack(np.ascontiguousarray(array), codec)


def decode_frame(
    payload: bytes | memoryview, codec: str, shape: tuple[int, ...], out: np.ndarray | None = None
) -> np.ndarray:
    """The uint8 frame of `shape` ([H, W] or [H, W, 3]) in a member's payload.

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
    """Label planes [P, H, W] (uint8, or little-endian uint16) of one frame as the payload of a member."""
    return _pack(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")), codec)


def decode_mask(
    payload: bytes | memoryview, codec: str, shape: tuple[int, ...], dtype: str, out: np.ndarray | None = None
) -> np.ndarray:
    """Label planes of `shape` [P, H, W] and `dtype` in a member's payload; a PNG has one plane, of indices or grey.

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
    """PNG or JPEG; a stored picture of another number of channels than promised is not converted, but refused."""
    decode = imagecodecs.png_decode if codec == "png" else imagecodecs.jpeg8_decode
    if codec == "jpeg" and b"\xff\xd9" not in bytes(payload[-64:]):
        raise CorruptFrameError("jpeg frame is cut short")  # the decoder would fill the rest with grey
    try:
        frame = np.asarray(decode(bytes(payload)))
    except (RuntimeError, ValueError) as error:
        raise CorruptFrameError(f"{codec} frame does not decode: {error}") from None
    if frame.shape != out.shape or frame.dtype != np.uint8:
        raise CorruptFrameError(f"{codec} frame is {frame.shape} {frame.dtype}, promised {out.shape} uint8")
    np.copyto(out, frame)


def _mask_picture(payload: bytes | memoryview, size: tuple[int, ...]) -> np.ndarray:
    """The indices of a palette PNG, or the values of a grey one (imagecodecs would turn a palette into colours)."""
    try:
        with Image.open(io.BytesIO(payload), formats=("PNG",)) as picture:
            if (picture.height, picture.width) != tuple(size):
                raise CorruptFrameError(f"png mask is {picture.height} x {picture.width}, promised {size}")
            values = np.asarray(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise CorruptFrameError(f"png mask does not decode: {error}") from None
    if values.ndim != 2:
        raise CorruptFrameError(f"png mask has {values.ndim} dimensions; a palette or grey picture is needed")
    return values


def _pack(array: np.ndarray, codec: str) -> bytes:
    if codec == "zstd":
        return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress(array.data)
    if codec == "lz4":
        return bytes(lz4.frame.compress(array.data, content_checksum=True))
    raise ValueError(f"unknown codec {codec!r}")


def _unpack(payload: bytes | memoryview, codec: str, out: np.ndarray) -> None:
    """Decode into `out`, and never more than it holds: a bomb in a foreign shard cannot fill the memory."""
    flat = out.reshape(-1).view(np.uint8)
    if codec in ("zstd", "lz4"):
        decode = imagecodecs.zstd_decode if codec == "zstd" else imagecodecs.lz4f_decode
        try:
            # Asked before, since the lz4 decoder stops at the end of `out` without a word.
            if _stated_size(payload, codec) > len(flat):
                raise CorruptFrameError(f"frame unpacks to more than the promised {len(flat)} bytes")
            count = len(decode(payload, out=flat.data))  # type: ignore[arg-type]  # any buffer will do
        except (RuntimeError, zstandard.ZstdError) as error:
            raise CorruptFrameError(f"{codec} frame does not decode: {error}") from None
    else:
        raise ValueError(f"unknown codec {codec!r}")
    if count != len(flat):
        raise CorruptFrameError(f"{codec} frame has {count} bytes, promised {len(flat)} for {out.shape} {out.dtype}")


def _stated_size(payload: bytes | memoryview, codec: str) -> int:
    """The unpacked bytes that a frame's header states; 0 or less where it does not."""
    if codec == "zstd":
        return zstandard.frame_content_size(payload)
    return int(lz4.frame.get_frame_info(payload)["content_size"])
