"""The frames of a member: byte ranges of a `.npy`, or one picture; and their pixels, each format with its limits.

Legend: T frames, H and W pixels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from medsam2.cases.formats.limits import MAX_BYTES
from medsam2.shards.foreign_tar import Member
from medsam2.shards.record import CorruptFrameError, decode_frame, decode_mask

CODECS = {"npy": "raw", "png": "png", "jpg": "jpeg", "jpeg": "jpeg"}
HEADER_BYTES = 1 << 16  # of a .npy: far more than any header of a plain array
GREY_OR_PALETTE = ("1", "L", "P", "I", "I;16")


class SkippedError(ValueError):
    """A sample that cannot be used; the message says why, without any name."""


@dataclass(frozen=True)
class Frames:
    """The frames of an image or of a mask.

    Attributes:
        shape: [H, W] or [H, W, 3] of each. dtype: uint8 or uint16. places: one a frame.
    """

    codec: str
    shape: tuple[int, ...]
    dtype: str
    places: tuple[Member, ...]


def frames_of(file: IO[bytes], member: Member, ending: str, mask: bool) -> Frames:
    """The frames in one member of an image, or of a mask.

    Raises:
        SkippedError: a kind of array or picture that cannot be read as it stands.
    """
    if ending == "npy":
        return _array_frames(file, member, mask)
    codec = CODECS[ending]
    shape, dtype = _picture_shape(read(file, member), codec, mask)
    return Frames(codec, shape, dtype, (member,))


def joined(parts: Sequence[Frames], what: str) -> Frames:
    """Frames of several members as one sequence.

    Raises:
        SkippedError: they differ in format or size, or take more memory than the limit.
    """
    first = parts[0]
    if len({part.codec for part in parts}) > 1:
        raise SkippedError(f"its {what}s have several formats")
    if len({part.shape for part in parts}) > 1:
        raise SkippedError(f"its {what}s differ in size or channels")
    dtype = max((part.dtype for part in parts), key=lambda name: np.dtype(name).itemsize)
    if first.codec == "raw" and any(part.dtype != dtype for part in parts):
        raise SkippedError(f"its {what}s have several types")
    places = tuple(place for part in parts for place in part.places)
    size = len(places) * int(np.prod(first.shape, dtype=object)) * np.dtype(dtype).itemsize
    if size > MAX_BYTES:
        raise SkippedError(f"its {what}s unpack to more than the limit of {MAX_BYTES >> 30} GiB")
    return Frames(first.codec, first.shape, dtype, places)


def image_frame(file: IO[bytes], frames: Frames, number: int) -> np.ndarray:
    """Frame `number` of an image: uint8 [H, W] or [H, W, 3].

    Raises:
        SkippedError: it does not decode.
    """
    try:
        return decode_frame(read(file, frames.places[number]), frames.codec, frames.shape)
    except CorruptFrameError as error:
        raise SkippedError(f"an image does not decode ({error})") from None


def mask_frame(file: IO[bytes], frames: Frames, number: int) -> np.ndarray:
    """Frame `number` of a mask: [1, H, W], as a reader decodes it.

    Raises:
        SkippedError: it does not decode.
    """
    try:
        return decode_mask(read(file, frames.places[number]), frames.codec, (1, *frames.shape), frames.dtype)
    except CorruptFrameError as error:
        raise SkippedError(f"a mask does not decode ({error})") from None


def read(file: IO[bytes], member: Member) -> bytes:
    """The payload of a member, which the scan of the tar has found to be there."""
    file.seek(member.offset)
    return file.read(member.length)


def _picture_shape(content: bytes, codec: str, mask: bool) -> tuple[tuple[int, ...], str]:
    """Shape and type of a picture from its header alone: it is decoded only when these are sound."""
    from PIL import Image, UnidentifiedImageError

    what = "a mask" if mask else "an image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=(codec.upper(),)) as picture:
                mode, size = picture.mode, (picture.height, picture.width)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise SkippedError(f"{what} claims more pixels than any scan has (a decompression bomb?)") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise SkippedError(f"{what} is not readable as {codec}") from None
    if mask:
        if mode not in GREY_OR_PALETTE:
            raise SkippedError(f"its mask is {mode}: colours are no labels; a palette or grey PNG is needed")
        return size, "uint16" if mode in ("I", "I;16") else "uint8"
    if mode in ("1", "L"):
        return size, "uint8"
    if mode in ("RGB", "P"):  # the decoder gives the colours of a palette
        return (*size, 3), "uint8"
    raise SkippedError(f"its image is {mode}; grey or RGB of 8 bits is needed")


def _array_frames(file: IO[bytes], member: Member, mask: bool) -> Frames:
    """The frames of a `.npy` as byte ranges: [H, W], [T, H, W], and of images [H, W, 3] and [T, H, W, 3]."""
    shape, fortran, dtype, start = _array_header(read(file, Member(member.offset, min(member.length, HEADER_BYTES))))
    what = "mask" if mask else "image"
    allowed = ("|u1", "|b1", "<u2") if mask else ("|u1",)
    if dtype.str not in allowed:
        raise SkippedError(f"its {what} is an array of {dtype.str}; {' or '.join(allowed)} is needed")
    if fortran:
        raise SkippedError(f"its {what} is an array in Fortran order; C order is needed")
    colour = not mask and len(shape) in (3, 4) and shape[-1] == 3
    grid = 3 if colour else 2
    if len(shape) not in (grid, grid + 1) or min(shape) < 1:
        raise SkippedError(f"its {what} is an array with shape {shape}; [H, W] or [T, H, W] is needed")
    frame = shape[-grid:]
    count = shape[0] if len(shape) > grid else 1
    bytes_each = int(np.prod(frame, dtype=object)) * dtype.itemsize
    if count * bytes_each != member.length - start:
        raise SkippedError(f"its {what} is an array that is cut, or larger than its header says")
    places = tuple(Member(member.offset + start + n * bytes_each, bytes_each) for n in range(count))
    return Frames("raw", frame, "uint16" if dtype.itemsize == 2 else "uint8", places)


def _array_header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, Fortran order, type and length in bytes of a `.npy` header; nothing is unpickled."""
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = reader(stream)
        return tuple(int(side) for side in shape), bool(fortran), dtype, stream.tell()
    except Exception as error:  # numpy evaluates the header as a literal, which has many ways to fail
        raise SkippedError(f"an array has no readable header ({type(error).__name__})") from None
